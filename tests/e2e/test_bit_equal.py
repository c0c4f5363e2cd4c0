"""What only moves bytes gives bit-equal logits, in whatever order the copy stream does its work."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import TransferRaceError
from sparda_compile.forecast.weights import projections_of
from sparda_compile.isa.engines import DeferredEngine, use_engine
from sparda_compile.module.optimized import OptimizedModule
from sparda_compile.program import program
from sparda_compile.program.program import Program
from sparda_compile.testing import random_forecast

PROMPT_LENGTHS = (150, 37, 93)
# A block of each sequence fills in the first turn.
NEW_TOKENS = 12
SECOND_PROMPT = 40
MAX_TOKENS = 240
BUSY = {"page_ratio": 1.0, "machine": "h200"}
# K = 7 of 15 blocks; with page_ratio 1.5, 11 pages.
SMALL = {
    "block_size": 16,
    "pool_size": 8,
    "pool_stride": 4,
    "sink_blocks": 1,
    "local_blocks": 2,
    "top_k": 3,
    "max_tokens": MAX_TOKENS,
    "lowering": "eager",
    "prefill": "dense",  # which `auto` would choose by the machine that is planned for
}
HINTS = ("forecast", "previous_step", "previous_layer", "next_query", "ema")
SEEDS = (None, 0, 1, 2)
CHANGES = {
    "on_device": {"offload": "never"},
    "few_pages": {"page_ratio": 1.0},
    "all_pages": {"page_ratio": 3.0},
    "fifo_few_pages": {"eviction": "fifo", "page_ratio": 1.0},
    "unfused": {"disable_passes": ("fuse_selection",), "page_ratio": 1.0},
    "unscheduled": {"disable_passes": ("schedule_transfers",)},
    "in_line": {"disable_passes": ("insert_prefetch", "schedule_transfers")},
    "h200": BUSY,
    "early": BUSY | {"attend_before_repair": "always"},
}


class Lab:
    """One traced model, and what it says under each configuration."""

    def __init__(self, model, traced):
        projections = random_forecast(model, seed=1)
        self.forecast = {0: projections["bootstrap"], 1: projections[0]}
        first = optimize(traced, SpardaConfig(mode="forecast", **SMALL), forecast=self.forecast)
        self.captures = first.captures
        generator = torch.Generator().manual_seed(3)
        rows = len(PROMPT_LENGTHS)
        width = max(PROMPT_LENGTHS)
        self.ids = torch.randint(0, 256, (rows, width), generator=generator)
        self.more_ids = torch.randint(0, 256, (rows, SECOND_PROMPT), generator=generator)
        padding = width - torch.tensor(PROMPT_LENGTHS)
        self.mask = (torch.arange(width) >= padding[:, None]).long()
        self._baselines = {}

    def module(self, **config):
        config = SpardaConfig(**{**SMALL, **config})
        forecast = projections_of(self.forecast) if config.needs_forecast else {}
        return OptimizedModule(self.captures, config, forecast)

    def baseline(self, **config):
        """Return the logits of a configuration, computed once."""
        key = tuple(sorted(config.items()))
        if key not in self._baselines:
            self._baselines[key] = self.run(self.module(**config))
        return self._baselines[key]

    def truth(self, mode):
        """Return the logits that a mode must give: those of `query` for `exact`."""
        return self.baseline(mode="forecast" if mode == "forecast" else "query")

    def run(self, module):
        """Return the logits of two turns on one cache, [B, 2 * NEW_TOKENS, V]."""
        settings = {
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        one = module.generate(self.ids, attention_mask=self.mask, **settings)
        added = NEW_TOKENS + SECOND_PROMPT
        two = module.generate(
            torch.cat([one.sequences, self.more_ids], dim=1),
            attention_mask=torch.cat([self.mask, self.mask.new_ones(len(self.mask), added)], dim=1),
            past_key_values=one.past_key_values,
            **settings,
        )
        return torch.stack(one.logits + two.logits, dim=1)


@pytest.fixture(scope="module")
def lab(shared_llama, traced_llama):
    return Lab(shared_llama, traced_llama)


@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize("selector", ["quest", "lowbit2", "lowbit4"])
def test_exact_equals_query_with_other_selectors(lab, selector, hint):
    """Their turn comes with the late copies."""
    module = lab.module(mode="exact", hint=hint, selector=selector, page_ratio=1.0)
    assert torch.equal(lab.run(module), lab.baseline(mode="query", selector=selector))


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        *(("forecast", change) for change in CHANGES),
        *(("exact", change) for change in CHANGES),
        ("query", "on_device"),
        ("query", "unfused"),
        ("query", "fifo_few_pages"),
    ],
)
def test_moving_bytes_otherwise_changes_nothing(lab, mode, change):
    module = lab.module(mode=mode, **CHANGES[change])
    assert torch.equal(lab.run(module), lab.truth(mode))


def test_modes_differ(lab):
    """Else the tests here would hold for a selection that selects nothing."""
    logits = [
        lab.baseline(mode="query"),
        lab.baseline(mode="query", selector="quest"),
        lab.baseline(mode="query", selector="lowbit2"),
        lab.baseline(mode="forecast"),
        lab.baseline(mode="forecast", selector="lowbit2"),
    ]
    for i, one in enumerate(logits):
        assert torch.isfinite(one).all()
        for other in logits[:i]:
            assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("mode", ["query", "forecast", *(f"exact/{hint}" for hint in HINTS)])
def test_late_copies_change_nothing(lab, mode):
    mode, _, hint = mode.partition("/")
    module = lab.module(mode=mode, hint=hint or "forecast", **CHANGES["early"])
    assert torch.equal(lab.run(module), lab.truth(mode))
    for seed in SEEDS if hint != "previous_layer" else SEEDS[:2]:
        engine = DeferredEngine(seed)
        with use_engine(engine):
            logits = lab.run(module)
        assert torch.equal(logits, lab.truth(mode)), f"seed {seed}"
        assert engine.num_pending == 0


@pytest.mark.parametrize("mode", ["forecast", "exact"])
def test_late_copies_change_nothing_where_streams_do_not_overlap(lab, mode):
    with use_engine(DeferredEngine()) as engine:
        logits = lab.run(lab.module(mode=mode, page_ratio=1.0, machine="cpu"))
    assert torch.equal(logits, lab.truth(mode))
    assert engine.num_pending == 0


FORMATS = ("int8", "fp8", "int4", "values8", "values4")
# Where a block is and how it gets there: each with one format, and where most is copied with all.
# A format only says how a block is packed, which tests/kernels and tests/runtime try one by one.
PLACES = [
    *(("forecast", change) for change in ("on_device", "in_line")),
    *(("exact", change) for change in ("all_pages", "unscheduled", "h200", "early")),
    ("query", "few_pages"),
]
BUSIEST = [("forecast", "h200"), ("exact", "fifo_few_pages")]
ROUNDED = [
    *((FORMATS[i % len(FORMATS)], *place) for i, place in enumerate(PLACES)),
    *((kv_format, *place) for place in BUSIEST for kv_format in FORMATS),
]


@pytest.mark.parametrize(("kv_format", "mode", "change"), ROUNDED)
def test_what_is_rounded_is_rounded_wherever_it_is(lab, kv_format, mode, change):
    """Whether a block was resident when it was read, or came from CPU memory."""
    module = lab.module(mode=mode, kv_format=kv_format, **CHANGES[change])
    logits = lab.run(module)
    truth = lab.baseline(mode="forecast" if mode == "forecast" else "query", kv_format=kv_format)
    assert torch.equal(logits, truth)
    assert not torch.equal(logits, lab.truth(mode))


@pytest.mark.parametrize("mode", ["query", "forecast", *(f"exact/{hint}" for hint in HINTS)])
def test_late_copies_of_rounded_blocks_change_nothing(lab, mode):
    mode, _, hint = mode.partition("/")
    kv_format = FORMATS[len(mode + hint) % len(FORMATS)]
    module = lab.module(mode=mode, hint=hint or "forecast", kv_format=kv_format, **CHANGES["early"])
    truth = lab.baseline(mode="forecast" if mode == "forecast" else "query", kv_format=kv_format)
    for seed in (None, 0):
        with use_engine(DeferredEngine(seed)) as engine:
            assert torch.equal(lab.run(module), truth), f"seed {seed}"
        assert engine.num_pending == 0


# Formats whose pages may hold what CPU memory does.
RUNS = ("int8", "fp8", "int4")
STORED = [
    *((RUNS[i % len(RUNS)], *place) for i, place in enumerate(PLACES)),
    *((kv_format, *place) for place in BUSIEST for kv_format in RUNS),
]


@pytest.mark.parametrize(("kv_format", "mode", "change"), STORED)
def test_pages_of_stored_runs_change_nothing(lab, kv_format, mode, change):
    module = lab.module(mode=mode, kv_format=kv_format, page_format="stored", **CHANGES[change])
    truth = lab.baseline(mode="forecast" if mode == "forecast" else "query", kv_format=kv_format)
    assert torch.equal(lab.run(module), truth)


@pytest.mark.parametrize("mode", ["query", "forecast", "exact/forecast", "exact/ema"])
def test_late_copies_to_pages_of_stored_runs_change_nothing(lab, mode):
    mode, _, hint = mode.partition("/")
    kv_format = RUNS[len(mode + hint) % len(RUNS)]
    settings = {"kv_format": kv_format, "page_format": "stored", **CHANGES["early"]}
    module = lab.module(mode=mode, hint=hint or "forecast", **settings)
    truth = lab.baseline(mode="forecast" if mode == "forecast" else "query", kv_format=kv_format)
    for seed in (None, 0):
        with use_engine(DeferredEngine(seed)) as engine:
            assert torch.equal(lab.run(module), truth), f"seed {seed}"
        assert engine.num_pending == 0


def without_wait(module, index):
    """Take the `index`-th wait out of a module's decode program, behind the verifier's back."""
    plan = module.programs.get("decode", len(PROMPT_LENGTHS), MAX_TOKENS, last_only=True).plan
    graph_module = plan.graph_module
    waits = [n for n in graph_module.graph.nodes if "wait_blocks" in str(n.target)]
    assert len(waits) == 4
    graph_module.graph.erase_node(waits[index])
    graph_module.recompile()
    module.programs.put(plan, Program(dataclasses.replace(plan), module.programs.forecast))
    return waits[index].name


@pytest.mark.parametrize("index", range(4))
def test_a_missing_wait_is_found_in_the_first_run(lab, index):
    """Whether or not an engine would have shown it."""
    module = lab.module(mode="forecast", page_ratio=1.0)
    without_wait(module, index)
    with pytest.raises(TransferRaceError, match="copy stream"):
        lab.run(module)


# Two for prefetches, two for offloads. The copy stream is in order and the first offload's wait
# has another behind it before anything reads, so a run cannot miss that one.
@pytest.mark.parametrize("index", [0, 1, 3])
def test_late_copies_show_a_missing_wait(lab, index, monkeypatch):
    monkeypatch.setattr(program, "check_recording", lambda *_: "unchecked")
    module = lab.module(mode="forecast", page_ratio=1.0)
    name = without_wait(module, index)
    # A machine without a second stream cannot tell.
    assert torch.equal(lab.run(module), lab.baseline(mode="forecast"))
    with use_engine(DeferredEngine()):
        logits = lab.run(module)
    assert not torch.equal(logits, lab.baseline(mode="forecast")), name
