"""The memory of a prompt, worked out, is what a run holds."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from sparda_compile import SpardaConfig, explain, optimize
from sparda_compile.isa.table import INSTRUCTIONS
from sparda_compile.program import explain as explain_module
from sparda_compile.program import memory, slices
from sparda_compile.program.chunks import chunk_sizes
from sparda_compile.program.memory import prompt_memory
from sparda_compile.program.slices import SlicedPiece
from sparda_compile.sizes import BATCH_SIZE, NUM_TOKENS
from sparda_compile.testing import build, tiny_llama

SMALL = {
    "top_k": 2, "local_blocks": 1, "block_size": 16, "pool_size": 8, "pool_stride": 4,
    "max_tokens": 512, "lowering": "eager",
}  # fmt: skip

# Which lengths it rotates how makes the first piece look at all tokens.
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "factor": 4.0,
    "long_factor": [4.0 + i for i in range(8)], "original_max_position_embeddings": 64,
}  # fmt: skip


class Held:
    """Counts the bytes that registers hold behind each call, as an observer of a run."""

    def __init__(self, num_inputs):
        self._storages = {}
        self._num_inputs = num_inputs
        self.most = 0

    def begin(self, call, args, kwargs):
        pass

    def end(self, call, results):
        for register, result in zip(call.results, results, strict=False):
            if isinstance(result, torch.Tensor):
                self._storages[register] = result.untyped_storage()
        by_place = {s.data_ptr(): s.nbytes() for s in self._storages.values()}
        self.most = max(self.most, sum(by_place.values()))
        for register in call.frees:
            self._storages.pop(register, None)


def fast_of(model, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optimize(model, SpardaConfig(**{**SMALL, **settings}))


@pytest.fixture(scope="module")
def traced():
    """Return what gives the module of a model, each traced once."""
    return functools.cache(lambda name: fast_of(build(name)))


def held_by(fast, program, batch, tokens):
    call = {
        "input_ids": torch.full((batch, tokens), 7),
        "position_ids": torch.arange(tokens).expand(batch, -1),
        "sparda_token_mask": torch.ones(batch, tokens, dtype=torch.bool),
        "sparda_num_past": 0, "sparda_may_hide": False, NUM_TOKENS: tokens, BATCH_SIZE: batch,
    }  # fmt: skip
    cache = fast.new_cache()
    fast(torch.full((batch, 2), 7), past_key_values=cache)  # makes the state
    cache.kv.state["sparda_lengths"].zero_()
    held = Held(program.lowered.num_inputs)
    program.lowered.run(program._bound(call, cache.kv), held)
    return held.most


@pytest.mark.parametrize("rows", [64, 8192])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_registers_hold_what_was_worked_out(name, prefill, batch, rows, traced, monkeypatch):
    """Of what a call takes on its way a run on a CPU says nothing; so that is left out."""
    monkeypatch.setattr(slices, "SLICE_ROWS", rows)
    monkeypatch.setattr(SlicedPiece, "copied_bytes", lambda *_: 0)
    monkeypatch.setattr(memory._Walk, "_taken_by", lambda *_: 0)
    fast = fast_of(traced(name), mode="query", prefill=prefill, offload="always")
    phase = "sparse_prefill" if prefill == "sparse" else "prefill"
    program = fast.programs.get(phase, batch, 512, last_only=True)
    for instruction in INSTRUCTIONS.values():
        monkeypatch.setitem(instruction.__dict__, "workspace", None)
    worked_out = prompt_memory(program.plan, 160).peak_bytes
    held = held_by(fast, program, batch, 160)
    if rows == 64:
        assert held == worked_out
    else:
        assert held <= worked_out  # a piece that runs whole may return views of one tensor


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_behind_a_piece_that_runs_whole_nothing_takes_its_memory(prefill, monkeypatch):
    """The residual stream is there twice then, while it goes from one to the other."""
    monkeypatch.setattr(slices, "SLICE_ROWS", 64)
    monkeypatch.setattr(SlicedPiece, "copied_bytes", lambda *_: 0)
    monkeypatch.setattr(memory._Walk, "_taken_by", lambda *_: 0)
    model = tiny_llama(rope_parameters=LONG_ROPE, max_position_embeddings=1024)
    fast = fast_of(model, mode="query", prefill=prefill, offload="always")
    phase = "sparse_prefill" if prefill == "sparse" else "prefill"
    program = fast.programs.get(phase, 1, 512, last_only=True)
    for instruction in INSTRUCTIONS.values():
        monkeypatch.setitem(instruction.__dict__, "workspace", None)
    worked_out = prompt_memory(program.plan, 160)
    assert worked_out.whole
    held = held_by(fast, program, 1, 160)
    # A piece that runs whole may return views of one tensor: less than a residual stream.
    assert held <= worked_out.peak_bytes < held + 160 * 64 * 4


def test_slices_bound_what_a_long_prompt_takes():
    """Of eight times the width only a slice is there: a token costs what is kept of it."""
    model = tiny_llama(hidden_size=64, intermediate_size=4096)
    fast = fast_of(model, mode="query", lowering="inductor")
    plan = fast.programs.latest_plan("prefill")
    few, many = (prompt_memory(plan, n).peak_bytes for n in (1 << 15, 1 << 16))
    per_token = (many - few) / (1 << 15)
    assert per_token < 4096 * 4
    assert few > 8192 * 2 * 4096 * 4


def test_a_long_past_is_part_of_it(traced_llama):
    plan = fast_of(traced_llama, mode="query").programs.latest_plan("prefill")
    assert prompt_memory(plan, 64, 4096).peak_bytes > prompt_memory(plan, 64).peak_bytes


def test_explain_says_what_all_of_it_takes(traced_llama):
    report = explain(traced_llama, SpardaConfig(**{**SMALL, "max_tokens": 65536}))
    prompt = report.prompt
    assert prompt.num_tokens == 65536
    assert prompt.whole == ()
    parts = report.weight_bytes + report.device_bytes + prompt.peak_bytes
    assert report.peak_device_bytes == report.to_dict()["peak_device_bytes"] == parts
    assert "\nMemory while 1 x 65536 tokens are read: " in str(report)
    assert "planned for a CPU: SpardaConfig.machine plans for h100 or h200" in str(report)
    assert prompt.peak_call in repr(report)
    without_schedule = {**SMALL, "disable_passes": ("schedule_transfers",)}
    assert "planned for a CPU" in str(explain(traced_llama, SpardaConfig(**without_schedule)))
    chunked = explain(traced_llama, SpardaConfig(**{**SMALL, "chunk_tokens": 100}))
    assert chunked.prompt.num_tokens == 100
    assert "\nMemory while 1 x 512 tokens are read, 100 at once: " in str(chunked)
    on_gpu = explain(traced_llama, SpardaConfig(**{**SMALL, "machine": "h200"}))
    assert "GPU memory while 1 x 512 tokens are read: " in str(on_gpu)
    assert "planned for a CPU" not in str(on_gpu)


def test_explain_says_what_graphs_of_short_prompts_keep(traced_llama, monkeypatch):
    def kept(**settings):
        given = {**SMALL, "max_tokens": 65536, "machine": "h200", **settings}
        return explain(traced_llama, SpardaConfig(**given))

    report = kept()
    assert 0 < report.prompt.kept_bytes <= 1 << 28
    assert "stay in CUDA graphs of short prompts" in str(report)
    for settings in ({"cuda_graph": False}, {"machine": "cpu"}):
        without = kept(**settings)
        assert without.prompt.kept_bytes == 0
        assert "CUDA graphs" not in str(without)
    monkeypatch.setattr(explain_module, "MOST_BYTES", 1000)
    assert kept().prompt.kept_bytes == 1000


def test_explain_chooses_the_chunk_that_a_gpu_has_room_for(traced_llama):
    model, config = traced_llama, SpardaConfig(**{**SMALL, "max_tokens": 65536})
    whole = explain(model, config)
    beside = whole.weight_bytes + whole.device_bytes
    assert whole.prompt.fits
    assert whole.prompt.room_bytes is None
    ample = explain(model, config, memory_bytes=2 * whole.peak_device_bytes)
    assert (ample.prompt.num_tokens, ample.prompt.fits) == (65536, True)
    part = explain(model, config, memory_bytes=whole.peak_device_bytes)  # a reserve is kept
    assert part.prompt.num_tokens < 65536
    assert part.prompt.num_tokens in chunk_sizes(config, 65536)
    # But for the lengths of the sequences, which belong to no layer.
    assert part.prompt.room_bytes == pytest.approx(whole.prompt.peak_bytes, abs=4)
    assert part.prompt.fits
    assert f"are read, {part.prompt.num_tokens} at once: " in str(part)
    none = explain(model, config, memory_bytes=beside + 1000)
    assert (none.prompt.num_tokens, none.prompt.fits) == (16, False)
    assert "B are left: it does not fit" in str(none)


def test_explain_names_what_runs_whole():
    model = tiny_llama(rope_parameters=LONG_ROPE, max_position_embeddings=1024)
    report = explain(model, SpardaConfig(**SMALL))
    ((name, reason),) = report.prompt.whole
    assert "of some tokens depends on others" in reason
    assert f"{name} runs whole: {reason}" in str(report)


@pytest.mark.gpu
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_a_gpu_takes_what_was_worked_out(prefill):
    model = tiny_llama(
        hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_key_value_heads=2,
        head_dim=128, num_hidden_layers=4, max_position_embeddings=1 << 17,
    ).to("cuda", torch.bfloat16)  # fmt: skip
    config = SpardaConfig(mode="query", prefill=prefill, max_tokens=1 << 17)
    want = explain(model, config).peak_device_bytes
    fast = optimize(model, config)
    ids = torch.randint(0, 256, (1, (1 << 17) - 16), device="cuda")
    for _ in range(2):  # the first run compiles
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        fast.generate(ids, max_new_tokens=2, do_sample=False)
    assert torch.cuda.max_memory_allocated() == pytest.approx(want, rel=0.05)
