"""Formats of blocks on a CUDA GPU: the same wherever a block is, and near what a CPU makes of it.

A ragged batch of four, for 2,048 steps where copies are as they come, and for 100 where streams
idle at random points.
"""

from __future__ import annotations

import pytest
import torch

import sparda_compile
from sparda_compile import SpardaConfig
from sparda_compile.isa.engines import DelayEngine
from sparda_compile.registry import KV_FORMATS
from sparda_compile.testing import random_forecast, tiny_llama

pytestmark = pytest.mark.gpu

FORMATS = ("int8", "fp8", "int4", "values8", "values4")
RUNS = ("int8", "fp8", "int4")  # whose pages may hold what CPU memory does
PROMPT_LENGTHS = (200, 121, 90, 37)
MAX_TOKENS, STEPS = 2304, 2048
SMALL = {
    "block_size": 16, "top_k": 3, "local_blocks": 1, "max_tokens": MAX_TOKENS, "lowering": "eager",
}  # fmt: skip
CHANGES = [
    ("query", {"offload": "never"}),
    ("query", {"page_ratio": 1.0, "eviction": "fifo"}),
    ("forecast", {"offload": "never"}),
    ("forecast", {"page_ratio": 1.0}),
    ("forecast", {"cuda_graph": False}),
    ("exact", {"page_ratio": 1.0}),
    ("exact", {"disable_passes": ("insert_prefetch", "schedule_transfers")}),
]


class Lab:
    """One model, traced once on a device; modules of it and what they generate."""

    def __init__(self, device, dtype):
        model = tiny_llama()
        weights = random_forecast(model)
        self.forecast = {0 if k == "bootstrap" else k + 1: v for k, v in weights.items()}
        self.model, self.traced, self.truths = model.to(device=device, dtype=dtype), None, {}
        generator = torch.Generator().manual_seed(3)
        longest = max(PROMPT_LENGTHS)
        ids = torch.randint(1, 250, (len(PROMPT_LENGTHS), longest), generator=generator)
        mask = torch.arange(longest) >= longest - torch.tensor(PROMPT_LENGTHS)[:, None]
        self.ids, self.mask = ids.to(device), mask.long().to(device)

    def module(self, **changes):
        config = SpardaConfig(**(SMALL | changes))
        forecast = self.forecast if config.needs_forecast else None
        module = sparda_compile.optimize(self.traced or self.model, config, forecast=forecast)
        self.traced = self.traced or module
        return module

    def run(self, module, steps=STEPS):
        """Return the logits of a greedy generation."""
        out = module.generate(
            input_ids=self.ids, attention_mask=self.mask, max_new_tokens=steps, do_sample=False,
            pad_token_id=0, eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(out.logits)

    def truth(self, mode, **changes):
        """Return the run that the others of a mode must equal."""
        mode = "query" if mode == "exact" else mode
        key = (mode, *changes.items())
        if key not in self.truths:
            self.truths[key] = self.run(self.module(mode=mode, **changes))
        return self.truths[key]

    def turns(self, module, *sizes):
        """Return the logits of tokens that are read in turns of some sizes."""
        logits, past, begin = [], None, 0
        with torch.no_grad():
            for size in sizes:
                out = module(self.ids[:2, begin : begin + size], past_key_values=past)
                logits, past, begin = [*logits, out.logits], out.past_key_values, begin + size
        return torch.cat(logits, 1)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def lab(request):
    return Lab("cuda", request.param)


@pytest.mark.parametrize(("mode", "changes"), CHANGES, ids=str)
@pytest.mark.parametrize("kv_format", FORMATS)
def test_logits_do_not_depend_on_where_blocks_are(lab, kv_format, mode, changes):
    module = lab.module(mode=mode, kv_format=kv_format, **changes)
    logits, want = lab.run(module), lab.truth(mode, kv_format=kv_format)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, want), (logits != want).any(-1).nonzero()[:3].tolist()
    assert not torch.equal(logits, lab.truth(mode))
    if "offload" not in changes:
        stored = KV_FORMATS[kv_format].num_bytes(16, 16, lab.model.dtype)
        total = module.sparda.stats().total
        assert total.d2h_bytes % stored == 0
        assert total.d2h_bytes > 30 * stored


@pytest.mark.parametrize("mode", ["query", "forecast", "exact"])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_random_delays_change_nothing(lab, kv_format, mode):
    steps = 100
    module = lab.module(mode=mode, kv_format=kv_format, cuda_graph=False, page_ratio=1.0)
    want = lab.truth(mode, kv_format=kv_format)[:steps]
    for seed in range(5):
        rows = len(PROMPT_LENGTHS)
        decode = module.programs.get("decode", rows, MAX_TOKENS, last_only=True)
        decode._engine = DelayEngine(torch.device("cuda"), seed)
        assert torch.equal(lab.run(module, steps), want), seed


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_turns_read_the_same_wherever_blocks_are(lab, kv_format, prefill):
    settings = {"mode": "forecast", "prefill": prefill, "kv_format": kv_format}
    sizes = (70, 45, 1, 1, 50, 1)
    want = lab.turns(lab.module(**settings, offload="never"), *sizes)
    assert torch.isfinite(want).all()
    for changes in ({}, {"page_ratio": 1.0}, {"cuda_graph": False}):
        assert torch.equal(lab.turns(lab.module(**settings, **changes), *sizes), want)


@pytest.mark.parametrize(("mode", "changes"), CHANGES, ids=str)
@pytest.mark.parametrize("kv_format", RUNS)
def test_pages_of_runs_change_nothing(lab, kv_format, mode, changes):
    """Attention makes the numbers that the gather makes, in tiles of many blocks."""
    module = lab.module(mode=mode, kv_format=kv_format, page_format="stored", **changes)
    logits, want = lab.run(module), lab.truth(mode, kv_format=kv_format)
    assert torch.equal(logits, want), (logits != want).any(-1).nonzero()[:3].tolist()
    if "offload" not in changes:
        total = module.sparda.stats().total
        assert total.d2h_bytes > 30 * KV_FORMATS[kv_format].num_bytes(16, 16, lab.model.dtype)


@pytest.mark.parametrize("mode", ["query", "forecast", "exact"])
@pytest.mark.parametrize("kv_format", RUNS)
def test_pages_of_runs_of_a_block_a_tile(lab, kv_format, mode):
    settings = {"mode": mode, "kv_format": kv_format, "block_size": 64, "page_ratio": 1.0}
    one, other = (lab.module(page_format=name, **settings) for name in ("model", "stored"))
    assert torch.equal(lab.run(other, 700), lab.run(one, 700))


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("kv_format", RUNS)
def test_speculation_reads_pages_of_runs(lab, kv_format, block_size):
    settings = {
        "mode": "speculate", "offload": "never", "speculate_where": "always",
        "kv_format": kv_format, "block_size": block_size,
    }  # fmt: skip
    one, other = (lab.module(page_format=name, **settings) for name in ("model", "stored"))
    assert torch.equal(lab.run(other, 300), lab.run(one, 300))


@pytest.mark.parametrize("mode", ["query", "forecast", "exact"])
@pytest.mark.parametrize("kv_format", RUNS)
def test_random_delays_change_nothing_on_pages_of_runs(lab, kv_format, mode):
    settings = {"kv_format": kv_format, "page_format": "stored", "page_ratio": 1.0}
    module = lab.module(mode=mode, cuda_graph=False, **settings)
    want = lab.truth(mode, kv_format=kv_format)[:100]
    for seed in range(3):
        rows = len(PROMPT_LENGTHS)
        decode = module.programs.get("decode", rows, MAX_TOKENS, last_only=True)
        decode._engine = DelayEngine(torch.device("cuda"), seed)
        assert torch.equal(lab.run(module, 100), want), seed


@pytest.mark.parametrize("offload", ["always", "never"])
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
@pytest.mark.parametrize("kv_format", RUNS)
def test_turns_read_the_same_from_pages_of_runs(lab, kv_format, prefill, offload):
    settings = {"mode": "forecast", "prefill": prefill, "kv_format": kv_format, "offload": offload}
    # Short turns behind pasts of one rounded length: read, captured, and replayed twice.
    sizes = (70, 10, 12, 1, 15, 1, 50, 1)
    one, other = (lab.module(page_format=name, **settings) for name in ("model", "stored"))
    assert torch.equal(lab.turns(other, *sizes), lab.turns(one, *sizes))


@pytest.mark.parametrize("mode", ["query", "forecast", "dense"])
def test_a_cache_stays_on_the_gpu_in_small_pages_where_only_they_fit(lab, mode):
    """With the bits of the format that was chosen, offloaded; a token fewer does not fit."""
    settings = {"mode": mode, "prefill": "dense"} | ({"top_k": None} if mode == "dense" else {})
    chosen = {"kv_format": "auto", "page_format": "auto", "offload": "auto"}
    stays = lab.module(**settings, kv_format="int8", page_format="stored", offload="never")
    want = lab.run(stays, 300)
    with torch.no_grad():
        layout = stays(lab.ids, attention_mask=lab.mask).past_key_values.kv.layout
    limit = layout.num_bytes(on_host=False)
    module = lab.module(**settings, **chosen, device_bytes=limit)
    assert torch.equal(lab.run(module, 300), want)
    stats = module.sparda.stats()
    assert set(stats.formats.values()) == {"int8"}
    assert stats.page_format == "stored"
    assert stats.total.h2d_bytes == stats.total.d2h_bytes == 0
    if mode != "dense":
        chosen["kv_format"] = "int8"
        moved = lab.module(**settings, **chosen, device_bytes=limit - 1)
        assert torch.equal(lab.run(moved, 300), want)
        assert moved.sparda.stats().total.d2h_bytes > 0


@pytest.mark.parametrize(
    "settings",
    [{"mode": "dense"}, {"mode": "query"}, {"mode": "query", "selector": "lowbit2"}],
    ids=str,
)
@pytest.mark.parametrize("kv_format", FORMATS)
def test_turns_are_near_those_of_a_cpu(kv_format, settings):
    """In float32, with all blocks read: a code may be the next one where a key is between two."""
    settings = {**settings, "kv_format": kv_format, "top_k": None, "prefill": "dense"}
    got, want, exact = (
        each.turns(each.module(**(settings | changes)), 90, 40, 1, 1).cpu()
        for each, changes in (
            (Lab("cuda", torch.float32), {}),
            (Lab("cpu", torch.float32), {}),
            (Lab("cpu", torch.float32), {"kv_format": "model"}),
        )
    )
    rounding = (want - exact).square().mean().sqrt()
    assert (got - want).square().mean().sqrt() < rounding / 10
