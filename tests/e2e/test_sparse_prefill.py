"""Each token of a prompt reads the blocks that a decode step would select there.

Against the mathematics written a second time, against the module's own decode steps, and against
itself with the prompt cut otherwise, copies late, and the KV cache elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import KVCacheError, TransferRaceError
from sparda_compile.isa.engines import DeferredEngine, use_engine
from sparda_compile.isa.streams import COPY, SELECT
from sparda_compile.program import program
from sparda_compile.program.program import Program
from sparda_compile.testing import build, random_forecast, reference_decode, tiny_llama, tiny_nosa

SMALL = {
    "block_size": 16, "pool_size": 8, "pool_stride": 4, "sink_blocks": 1, "local_blocks": 1,
    "top_k": 2, "lowering": "eager", "prefill": "sparse",
}  # fmt: skip
IN_LINE = ("insert_prefetch", "schedule_transfers")
MODES = {
    "query": {"mode": "query"},
    "quest": {"mode": "query", "selector": "quest"},
    "forecast": {"mode": "forecast"},
    "exact": {"mode": "exact", "hint": "previous_step"},
}
LOW_BIT = {
    "lowbit2": {"mode": "query", "selector": "lowbit2"},
    "lowbit4 by forecast": {"mode": "forecast", "selector": "lowbit4"},
}


def ragged(*lengths):
    """Return left-padded tokens and their mask."""
    generator = torch.Generator().manual_seed(sum(lengths))
    width = max(lengths)
    ids = torch.randint(2, 250, (len(lengths), width), generator=generator)
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    return ids, mask


def generated(fast, ids, mask, num_new):
    out = fast.generate(
        ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def by_target(projections):
    return {0 if name == "bootstrap" else name + 1: w for name, w in projections.items()}


@pytest.fixture(scope="module")
def llama(shared_llama):
    return shared_llama


@pytest.fixture(scope="module")
def forecast(llama):
    return random_forecast(llama, seed=1)


@pytest.fixture(scope="module")
def module_of(traced_llama, forecast):
    """Return what gives a module of settings; `__wrapped__` makes one that a test may change."""

    @functools.cache
    def make(**settings):
        config = SpardaConfig(**{**SMALL, **settings})
        given = by_target(forecast) if config.needs_forecast else None
        return optimize(traced_llama, config, forecast=given)

    return make


class TestReference:
    """The same tokens and logits as the plain decoder, which reads one token at a time."""

    def check(self, model, fast, forecast, lengths, num_new, **rules):
        ids, mask = ragged(*lengths)
        tokens, logits = generated(fast, ids, mask, num_new)
        rules = {"pool_size": 8, "pool_stride": 4, "block_size": 16, **rules}
        for row, length in enumerate(lengths):
            want, want_logits = reference_decode(
                model, ids[row, -length:], num_new, top_k=2, sink_blocks=1, local_blocks=1,
                prefill="sparse", forecast=forecast, **rules,
            )  # fmt: skip
            assert tokens[row].tolist() == want
            torch.testing.assert_close(logits[row], torch.stack(want_logits), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("name", MODES)
    def test_modes(self, llama, module_of, forecast, name):
        settings = MODES[name]
        rules = {k: v for k, v in settings.items() if k != "hint"}
        self.check(llama, module_of(**settings), forecast, (150, 37), 12, **rules)

    @pytest.mark.parametrize("length", [1, 63, 64, 65, 81])
    def test_lengths_around_the_budget(self, llama, module_of, forecast, length):
        """Five blocks of 16 are read: 80 tokens is exactly the budget."""
        self.check(llama, module_of(mode="query"), forecast, (length,), 4, mode="query")

    @pytest.mark.parametrize("shared", [4, 16])
    @pytest.mark.parametrize("mode", ["query", "forecast"])
    def test_tokens_that_share_a_set(self, llama, module_of, forecast, mode, shared):
        fast = module_of(mode=mode, shared_tokens=shared)
        self.check(llama, fast, forecast, (150, 101), 5, mode=mode, shared_tokens=shared)

    @pytest.mark.parametrize(("heads", "groups"), [(8, 1), (8, 2), (8, 8), (16, 1)])
    def test_groups(self, heads, groups):
        """With the model of two groups of two heads: 8, 4, 1 and 16 heads a group."""
        model = tiny_llama(
            num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=groups, seed=3
        )
        forecast = random_forecast(model)
        fast = optimize(model, SpardaConfig(**SMALL, mode="forecast"), forecast=by_target(forecast))
        self.check(model, fast, forecast, (120, 90), 5, mode="forecast")

    def test_many_steps_behind_chunks(self, llama, module_of, forecast):
        fast = module_of(mode="forecast", chunk_tokens=64)
        self.check(llama, fast, forecast, (150, 37), 200, mode="forecast")

    def test_a_long_prompt_and_many_steps(self):
        """In chunks; of one layer and one KV head, which the plain decoder reads in seconds."""
        model = tiny_llama(
            num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1, seed=3,
            max_position_embeddings=8192,
        )  # fmt: skip
        sizes = {"block_size": 64, "pool_size": 64, "pool_stride": 64}
        fast = optimize(model, SpardaConfig(**SMALL | sizes, mode="query", chunk_tokens=500))
        self.check(model, fast, {}, (2049,), 200, mode="query", **sizes)

    @pytest.mark.parametrize("mode", ["query", "forecast"])
    def test_nosa(self, mode):
        model = tiny_nosa()
        forecast = random_forecast(model)
        config = SpardaConfig(**SMALL, mode=mode, selector="nosa", short_list=1)
        fast = optimize(model, config, forecast=by_target(forecast) if mode == "forecast" else None)
        self.check(model, fast, forecast, (120, 90), 5, mode=mode, selector="nosa", short_list=1)


@pytest.mark.parametrize("settings", (MODES | LOW_BIT).values(), ids=MODES | LOW_BIT)
def test_equals_decode_steps(module_of, settings):
    fast = module_of(**settings)
    ids, _ = ragged(130)
    whole, cache = fast(ids).logits, fast.new_cache(256)
    steps = [fast(token, past_key_values=cache).logits for token in ids.split(1, dim=1)]
    torch.testing.assert_close(whole, torch.cat(steps, dim=1), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def read(module_of):
    """Return what prompts give: 18 tokens, their logits, and the logits of the whole prompt."""

    @functools.cache
    def of(lengths, **settings):
        fast, (ids, mask) = module_of(**settings), ragged(*lengths)
        every = fast(ids, attention_mask=mask).logits
        return *generated(fast, ids, mask, 18), every[mask.bool()]

    return of


@pytest.mark.parametrize("mode", ["query", "forecast", "exact"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_however_a_prompt_is_cut(read, mode, chunk):
    lengths = (17, 12) if chunk == 1 else (150, 37, 93)
    got, want = read(lengths, mode=mode, chunk_tokens=chunk), read(lengths, mode=mode)
    assert torch.equal(got[0], want[0])
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("offload", ["always", "never"])
def test_sets_are_shared_however_a_prompt_is_cut_between_them(module_of, offload):
    """At multiples of them; elsewhere a call's first token picks for the rest of its run."""
    ids, _ = ragged(150)
    settings = {"mode": "forecast", "shared_tokens": 8, "offload": offload}
    want = module_of(**settings)(ids).logits
    for chunk in (16, 64):
        got = module_of(**settings, chunk_tokens=chunk)(ids).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    own = module_of(**{**settings, "shared_tokens": 1})(ids).logits
    assert (own - want).abs().max() > 1e-2


def test_turns_are_chunks(module_of):
    fast = module_of(mode="forecast")
    ids, _ = ragged(150)
    cache, parts, begin = fast.new_cache(256), [], 0
    for length in (70, 1, 33, 2, 44):
        part = ids[:, begin : begin + length]
        parts.append(fast(part, past_key_values=cache).logits)
        begin += length
    torch.testing.assert_close(torch.cat(parts, dim=1), fast(ids).logits, rtol=0, atol=1e-4)


def test_a_dense_prefill_is_cut_too(llama, module_of):
    ids, mask = ragged(90, 41)
    fast = module_of(mode="query", prefill="dense", chunk_tokens=7)
    want = llama(ids, attention_mask=mask).logits
    got = fast(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=0, atol=1e-3)
    assert set(fast.sparda.num_compilations) == {"prefill", "decode"}


@pytest.mark.parametrize("mode", ["forecast", "query"])
@pytest.mark.parametrize("chunk", [None, 33])
def test_what_moves_bytes_changes_nothing(module_of, mode, chunk):
    """Bit-equal with the cache on the device, with few pages, and with copies done late."""
    ids, mask = ragged(150, 37, 93)

    def made(**settings):
        return module_of(mode=mode, chunk_tokens=chunk, machine="h200", **settings)

    def run(fast):
        return generated(fast, ids, mask, 17)[1]

    want = run(made())
    for settings in ({"offload": "never"}, {"page_ratio": 1.0}, {"eviction": "fifo"}):
        assert torch.equal(run(made(**settings)), want), settings
    late = made(page_ratio=1.0)
    for seed in range(3):
        with use_engine(DeferredEngine(seed)):
            assert torch.equal(run(late), want), seed


class TestStagedAhead:
    """A layer's past blocks come while the layer before computes, in mode forecast."""

    @pytest.fixture
    def late_of(self, module_of):
        """Return a module of few pages, and the logits of a second turn on its own cache."""
        ids, _ = ragged(150)

        def logits_of(fast):
            cache = fast.new_cache(256)
            fast(ids[:, :100], past_key_values=cache)
            return fast(ids[:, 100:], past_key_values=cache).logits

        def make():
            settings = {"page_ratio": 1.0, "max_tokens": 256, "machine": "h200"}
            return module_of.__wrapped__(mode="forecast", **settings), logits_of

        return make

    def plan_of(self, fast, rows=1):
        return fast.programs.get("sparse_prefill", rows, 256, last_only=False).plan

    def without(self, fast, name):
        """Take an op out of a module's program, behind the verifier's back."""
        plan = self.plan_of(fast)
        graph = plan.graph_module.graph
        graph.erase_node(next(n for n in graph.nodes if n.name == name))
        plan.graph_module.recompile()
        fast.programs.put(plan, Program(dataclasses.replace(plan), fast.programs.forecast))

    def test_selection_and_copy_of_a_layer_come_before_the_attention_of_the_one_before(
        self, late_of
    ):
        fast, logits_of = late_of()
        logits_of(fast)
        order = [n.name for n in self.plan_of(fast).graph_module.graph.nodes]
        ahead = ("past_1", "stage_1", "staged_1")
        assert max(map(order.index, ahead)) < order.index("attend_tokens_0")
        waited = order.index("wait_blocks_1")
        assert order.index("attend_tokens_0") < waited < order.index("block_ids_1")
        schedule = self.plan_of(fast).schedule
        streams = {row.node: row.stream for row in schedule.rows}
        assert (streams["past_1"], streams["stage_1"]) == (SELECT, COPY)

    @pytest.mark.parametrize("name", ["wait_blocks_0", "wait_blocks_1"])
    def test_a_missing_wait_is_found_in_the_first_run(self, late_of, name):
        fast, logits_of = late_of()
        self.without(fast, name)
        with pytest.raises(TransferRaceError, match=r"(copy|select) stream"):
            logits_of(fast)

    @pytest.mark.parametrize("name", ["wait_blocks_0", "wait_blocks_1"])
    def test_late_copies_show_a_missing_wait(self, late_of, name, monkeypatch):
        (right, logits_of), (fast, _) = late_of(), late_of()
        want = logits_of(right)
        monkeypatch.setattr(program, "check_recording", lambda *_: "unchecked")
        self.without(fast, name)
        # A machine without a second stream cannot tell.
        assert torch.equal(logits_of(fast), want)
        with use_engine(DeferredEngine()):
            assert not torch.equal(logits_of(fast), want)

    @pytest.mark.parametrize("hidden", [0, 1])
    def test_what_is_staged_early_is_what_one_selection_reads(self, module_of, hidden):
        """Bit-equal with the same choice made at once, in every chunk and sequence."""
        ids, mask = ragged(150, 37, 93)
        mask[0, 70:72] = 1 - hidden
        for chunk in (7, 33, 64, None):
            settings = {"mode": "forecast", "chunk_tokens": chunk, "max_tokens": 256}
            early = module_of(**settings)
            at_once = module_of(**settings, disable_passes=IN_LINE)
            got, want = (m(ids, attention_mask=mask).logits for m in (early, at_once))
            assert torch.equal(got, want), chunk
            ops = [
                {n.name for n in self.plan_of(fast, 3).graph_module.graph.nodes}
                for fast in (early, at_once)
            ]
            assert "past_1" in ops[0] - ops[1]


@pytest.mark.slow
def test_compiled(traced_llama, module_of):
    ids, mask = ragged(120, 60)
    plain = generated(module_of(mode="forecast"), ids, mask, 9)
    compiled = generated(module_of(mode="forecast", lowering="inductor"), ids, mask, 9)
    assert torch.equal(plain[0], compiled[0])
    torch.testing.assert_close(plain[1], compiled[1], rtol=0, atol=1e-3)


def test_full_budget_equals_the_original(llama, module_of):
    ids, mask = ragged(150, 37)
    fast = module_of(mode="query", top_k=None)
    got, want = fast(ids, attention_mask=mask).logits, llama(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=0, atol=1e-3)
    assert set(fast.sparda.num_compilations) == {"prefill", "decode"}


def test_layers_with_windows():
    model = build("gemma3")
    ids, mask = ragged(130, 70)
    fast = optimize(model, SpardaConfig(**SMALL, mode="query"))
    tokens, logits = generated(fast, ids, mask, 10)
    for chunk in (7, 50):
        cut = optimize(fast, SpardaConfig(**SMALL, mode="query", chunk_tokens=chunk))
        got = generated(cut, ids, mask, 10)
        assert torch.equal(got[0], tokens)
        torch.testing.assert_close(got[1], logits, rtol=0, atol=1e-4)


def test_decode_finds_what_the_last_token_has_read(module_of):
    """The first step after a sparse prompt fetches what is new to it, and not all that it reads."""

    def misses_of_the_first_step(prefill):
        fast = module_of(mode="query", prefill=prefill)
        ids, _ = ragged(150)
        cache = fast(ids).past_key_values
        fast.sparda.reset_stats()
        fast(ids[:, :1], past_key_values=cache)
        return fast.sparda.stats().total.misses

    assert misses_of_the_first_step("sparse") < misses_of_the_first_step("dense")


def test_the_hint_of_the_first_step_is_what_the_last_token_has_read(module_of):
    fast = module_of(mode="exact", hint="previous_step")
    ids, mask = ragged(150, 90)
    cache = fast(ids, attention_mask=mask).past_key_values
    kept = [cache.kv.state[f"sparda_last_block_ids_{layer}"].clone() for layer in (0, 1)]
    # The token in block 9, or 5: the first block, its own, the one before and two by score.
    for ids_BGK in kept:
        for row, current in enumerate((9, 5)):
            for ids_K in ids_BGK[row].tolist():
                assert len(set(ids_K)) == 5
                assert {0, current - 1, current} <= set(ids_K)
    more = torch.nn.functional.pad(mask, (0, 3), value=1)
    more[1, -3:-1] = 0
    fast(ids[:, :3], attention_mask=more, past_key_values=cache)
    now = cache.kv.state["sparda_last_block_ids_0"]
    assert now[0].max() == 9
    assert now[1].max() == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_chunk_breaks_the_cache_alone(module_of, monkeypatch, error):
    fast = module_of(mode="query", chunk_tokens=40)
    ids, _ = ragged(150)
    want = fast(ids).logits
    cache, calls = fast.new_cache(256), []
    run = Program.__call__

    def interrupted(self, *args, **rest):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return run(self, *args, **rest)

    monkeypatch.setattr(Program, "__call__", interrupted)
    with pytest.raises(error):
        fast(ids, past_key_values=cache)
    monkeypatch.undo()
    with pytest.raises(KVCacheError, match="began and did not end"):
        fast(ids[:, :1], past_key_values=cache)
    cache.reset()
    assert torch.equal(fast(ids, past_key_values=cache).logits, want)
    assert torch.equal(fast(ids).logits, want)
