"""A prompt in slices gives what it gives in one piece, and nothing of it is needed whole."""

from __future__ import annotations

import functools
import itertools
import warnings

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import TransferRaceError
from sparda_compile.isa.engines import DeferredEngine, use_engine
from sparda_compile.program import slices
from sparda_compile.program.lower import lower
from sparda_compile.program.pieces import compiled_pieces
from sparda_compile.program.recording import record_run
from sparda_compile.program.run_proof import check_recording
from sparda_compile.program.slices import SLICE_ROWS, SlicedPiece, slices_of
from sparda_compile.testing import build, tiny_llama

SMALL = {
    "top_k": 2, "local_blocks": 1, "block_size": 16, "pool_size": 8, "pool_stride": 4,
    "max_tokens": 512, "lowering": "eager",
}  # fmt: skip
ROWS = 48


@pytest.fixture
def few_rows(monkeypatch):
    """Make slices short, and return the sizes of all that pieces were given."""
    given = []
    monkeypatch.setattr(slices, "SLICE_ROWS", ROWS)
    run = SlicedPiece._run

    def noted(self, sizes, inputs, parts):
        given.append((sizes["num_tokens"], parts))
        return run(self, sizes, inputs, parts)

    monkeypatch.setattr(SlicedPiece, "_run", noted)
    return given


@pytest.mark.parametrize("batch", [1, 3, 5000, 100000])
@pytest.mark.parametrize(
    "tokens",
    [2, 3, 4, 5, 7, SLICE_ROWS, SLICE_ROWS + 1, SLICE_ROWS + 2, 2 * SLICE_ROWS + 1, 100_001],
)
def test_slices_follow_each_other_and_none_is_a_single_token(batch, tokens):
    parts = slices_of(batch, tokens)
    assert parts[0][0] == 0
    assert parts[-1][1] == tokens
    assert all(one[1] == other[0] for one, other in itertools.pairwise(parts))
    sizes = [end - begin for begin, end in parts]
    assert min(sizes) >= 2
    assert max(sizes) <= max(SLICE_ROWS // batch, 4)


def fast_of(model, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optimize(model, SpardaConfig(**{**SMALL, **settings}))


def logits_of(fast, batch, length, *, all_of_them=False):
    """Return the logits of a prompt whose second sequence is shorter, and of two more steps."""
    ids = torch.randint(2, 250, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1:, :37] = 0
    cache, found = fast.new_cache(), []
    for step in (ids, ids[:, :1], ids[:, 1:2]):
        keep = {} if all_of_them else {"logits_to_keep": 1}
        out = fast(step, attention_mask=mask, past_key_values=cache, **keep)
        found.append(out.logits.masked_fill(mask[:, -out.logits.shape[1] :, None] == 0, 0.0))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.cat(found, 1)


MODELS = ("llama", "mixtral", "gemma3", "gpt2", "phi3")


@pytest.fixture(scope="module")
def fast_by_name():
    """Return what gives the module of a model; each is traced once."""
    traced = functools.cache(lambda name: fast_of(build(name)))
    return functools.cache(
        lambda name, prefill: fast_of(traced(name), mode="query", prefill=prefill)
    )


@pytest.mark.parametrize("all_of_them", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
@pytest.mark.parametrize("name", MODELS)
def test_results_are_those_of_one_piece(name, prefill, batch, all_of_them, fast_by_name, few_rows):
    fast = fast_by_name(name, prefill)
    got = logits_of(fast, batch, 131, all_of_them=all_of_them)
    assert len(few_rows) == 3  # each piece of two layers
    slices.SLICE_ROWS = SLICE_ROWS
    want = logits_of(fast, batch, 131, all_of_them=all_of_them)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_prompt_of_one_slice_is_given_as_it_is(traced_llama, few_rows):
    fast = fast_of(traced_llama, mode="query")
    logits_of(fast, 1, ROWS)
    logits_of(fast, 2, ROWS // 2)
    assert few_rows == []


def test_the_logits_of_the_last_token_need_the_last_slice_alone(traced_llama, few_rows):
    plan = fast_of(traced_llama).programs.latest_plan("prefill")
    piece = lower(plan.graph_module, "eager").pieces()[-1]
    sizes = []

    def forward(batch, tokens, *inputs):
        sizes.append((tokens, inputs[0].shape[2]))
        return piece.graph_module.forward(batch, tokens, *inputs)

    inputs = [
        torch.randn([{10007: 1, 524309: 131}.get(size, size) for size in node.meta["val"].shape])
        for node in piece.inputs
    ]
    (got,) = SlicedPiece(piece, forward)(1, 131, *inputs)
    assert sizes == [(35, 35)]
    (want,) = piece.graph_module.forward(1, 131, *inputs)
    torch.testing.assert_close(got, want)


def test_a_turn_is_sliced_too(traced_llama, few_rows):
    fast = fast_of(traced_llama, mode="query", chunk_tokens=70)
    logits_of(fast, 1, 131)
    assert {size for size, _ in few_rows} == {70, 61}


@pytest.mark.parametrize("mode", ["query", "forecast", "exact"])
def test_copies_that_are_late_see_what_they_should(mode, few_rows):
    """The memory that is written in place is nobody else's."""
    fast = fast_of(tiny_llama(num_hidden_layers=4), mode=mode, machine="h200", offload="always")
    want = logits_of(fast, 1, 131)
    with use_engine(DeferredEngine()):
        got = logits_of(fast, 1, 131)
    assert torch.equal(got, want)


def test_the_residual_stream_keeps_its_memory(few_rows):
    plan = fast_of(tiny_llama(num_hidden_layers=4)).programs.latest_plan("prefill")
    calls = [c for c in lower(plan.graph_module, "eager").calls if c.piece is not None]
    assert [len(call.reuses) for call in calls] == [0, 1, 1, 1, 0]


def _recorded(program, fast, length):
    cache = fast.new_cache()
    fast(torch.full((1, 2), 7), past_key_values=cache)
    call = {
        "input_ids": torch.full((1, length), 7),
        "position_ids": 2 + torch.arange(length)[None],
        "sparda_token_mask": torch.ones(1, length, dtype=torch.bool),
        "sparda_num_past": 2, "sparda_may_hide": False, "num_tokens": length, "batch_size": 1,
    }  # fmt: skip
    made = fast.programs.get("prefill", 1, 512, last_only=True)
    return check_recording(
        made.plan.graph_module.graph, record_run(program, made._bound(call, cache.kv))[1]
    )


def test_memory_that_is_taken_too_early_is_found(few_rows):
    fast = fast_of(tiny_llama(num_hidden_layers=4), mode="query")
    graph_module = fast.programs.latest_plan("prefill").graph_module
    assert _recorded(lower(graph_module, "eager"), fast, 100).pieces == 5
    program = lower(graph_module, "eager")
    call = next(c for c in program.calls if c.reuses)
    call.frees = tuple(r for r in call.frees if r != call.reuses[0][1])
    with pytest.raises(TransferRaceError, match="wrote its results to memory that is still in use"):
        _recorded(program, fast, 100)


def test_a_piece_that_looks_at_all_tokens_runs_whole(few_rows):
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "factor": 4.0,
        "long_factor": [4.0 + i for i in range(8)], "original_max_position_embeddings": 64,
    }  # fmt: skip
    fast = fast_of(tiny_llama(rope_parameters=rope, max_position_embeddings=1024), mode="query")
    got = logits_of(fast, 1, 131)
    assert len(few_rows) == 2  # not the first piece, which makes the rotation
    few_rows.clear()
    slices.SLICE_ROWS = SLICE_ROWS
    torch.testing.assert_close(got, logits_of(fast, 1, 131), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_slices_of_any_size_compile_nothing_more(batch, few_rows):
    fast = fast_of(tiny_llama(), mode="query", lowering="inductor")
    got = logits_of(fast, batch, 131)
    logits_of(fast, batch, 49 if batch == 1 else 65)  # one that a last slice has only two tokens of
    mine = {p.key for program in fast.programs.compiled() for p in program.lowered.pieces()}
    assert {compiled_pieces()[key].num_variants for key in mine} == {1}
    few_rows.clear()
    slices.SLICE_ROWS = SLICE_ROWS
    torch.testing.assert_close(got, logits_of(fast, batch, 131), rtol=1e-4, atol=1e-4)
    assert few_rows == []
