"""Mode `exact` with the predictor: `query` bit for bit over many steps, whatever it predicts."""

from __future__ import annotations

import warnings

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.isa.engines import DeferredEngine
from sparda_compile.registry import HINTS
from sparda_compile.testing import tiny_llama, tiny_nosa

SMALL = {
    "block_size": 16, "pool_size": 8, "pool_stride": 4, "local_blocks": 1, "top_k": 3,
    "page_ratio": 1.0, "machine": "h200", "lowering": "eager", "max_tokens": 512,
    "prefill": "dense", "attend_before_repair": "always",
}  # fmt: skip
# Of each of two turns. Blocks fill in each, and pages are taken from others; of the plainest case
# and the fullest the steps are many.
STEPS, MANY_STEPS = 16, 72
EVERY = tuple(name for name in HINTS.names() if name != "mixture")  # it has two of them in it
CASES = {
    "infllm2": {},
    "quest": {"selector": "quest"},
    "lowbit2": {"selector": "lowbit2"},
    "forecast with lowbit4": {"hint": ("ema", "forecast"), "selector": "lowbit4"},
    "on the device": {"offload": "never"},
    "more pages": {"page_ratio": 2.0},
    "trend": {"ema_damping": 1.0, "ema_level": 0.2},
    "calibrated": {"ema_calibrate": True},
    "calibrated by a sparse prompt": {"ema_calibrate": True, "prefill": "sparse"},
    "sparse prompt": {"prefill": "sparse"},
    "short turns": {"chunk_tokens": 16},
    "forecast": {"hint": ("ema", "forecast")},
    "forecast, repair in line": {"hint": ("ema", "forecast"), "attend_before_repair": "auto"},
    "forecast with quest": {"hint": ("ema", "forecast"), "selector": "quest"},
    "forecast on the device": {"hint": ("ema", "forecast"), "offload": "never"},
    "unscheduled": {"hint": ("ema", "next_query"), "disable_passes": ("schedule_transfers",)},
    "all hints": {"hint": EVERY, "page_ratio": 1.5},
    "mixture": {"hint": "mixture"},
    "mixture with quest": {"hint": ("mixture", "forecast"), "selector": "quest"},
    "mixture, calibrated, on the device": {
        "hint": "mixture",
        "ema_calibrate": True,
        "offload": "never",
    },
}


@pytest.fixture(scope="module")
def made(two_turns):
    """Return a function that optimizes a model, traced once, and remembers what `query` gives.

    Equal settings have one module, whose runs have a cache of their own each.
    """
    traced, modules, known = {}, {}, {}

    def make(family, **settings):
        key = (family, *sorted(settings.items()))
        if key not in modules:
            modules[key] = optimized(family, settings)
        return modules[key]

    def optimized(family, settings):
        if family not in traced:
            model = tiny_nosa() if family == "nosa" else tiny_llama(num_hidden_layers=3)
            traced[family] = optimize(model, SpardaConfig(mode="dense", lowering="eager"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a Forecast that nobody has trained
            return optimize(traced[family], SpardaConfig(**{**SMALL, **settings}))

    def by_query(family, steps, **settings):
        names = ("selector", "prefill", "chunk_tokens", "lowering", "short_list")
        mine = {name: settings[name] for name in names if name in settings}
        key = (family, steps, *sorted(mine.items()))
        if key not in known:
            known[key] = two_turns(make(family, mode="query", **mine), steps)[1]
        return known[key]

    make.by_query = by_query
    make.logits = lambda *args: two_turns(*args)[1]
    return make


@pytest.mark.parametrize("name", CASES)
def test_exact_is_query_over_two_turns(made, name):
    settings, steps = CASES[name], MANY_STEPS if name in ("infllm2", "all hints") else STEPS
    fast = made("llama", **{"mode": "exact", "hint": "ema", **settings})
    assert torch.equal(made.logits(fast, steps), made.by_query("llama", steps, **settings))
    total = fast.sparda.stats().total
    assert total.hits > 0


def test_exact_is_query_with_nosa(made):
    settings = {"selector": "nosa", "short_list": 2}
    fast = made("nosa", mode="exact", hint="ema", **settings)
    assert torch.equal(made.logits(fast, STEPS), made.by_query("nosa", STEPS, **settings))


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize(
    "name",
    ["infllm2", "quest", "forecast", "forecast, repair in line", "all hints", "mixture"],
)
def test_late_streams_change_nothing(made, name, seed):
    engine, settings = DeferredEngine(seed), CASES[name]
    fast = made("llama", **{"mode": "exact", "hint": "ema", **settings})
    want = made.by_query("llama", STEPS, **settings)
    assert torch.equal(made.logits(fast, STEPS, engine), want)
    assert engine.num_pending == 0


@pytest.mark.parametrize("hint", ["forecast", "next_query", ("ema", "forecast"), "mixture"])
def test_what_a_hint_brings_does_not_depend_on_where_it_is_computed(made, hint):
    """Which logits cannot show: on the compute stream, and on a select stream that is late."""
    brought = {}
    for disabled in (("schedule_transfers",), ()):
        fast = made("llama", mode="exact", hint=hint, page_ratio=2.0, disable_passes=disabled)
        made.logits(fast, STEPS, None if disabled else DeferredEngine(0))
        total = fast.sparda.stats().total
        brought[disabled] = total.hits, total.misses, total.h2d_bytes
    assert brought[()] == brought["schedule_transfers",]
    assert brought[()][2] > 0


def test_a_later_hint_tops_up_what_an_earlier_one_did_not_bring(made):
    misses = {}
    for hint in ("ema", "next_query", ("ema", "next_query")):
        fast = made("llama", mode="exact", hint=hint, page_ratio=2.0)
        made.logits(fast, STEPS)
        misses[hint] = fast.sparda.stats().total.misses
    assert misses["ema", "next_query"] < min(misses["ema"], misses["next_query"])


def test_one_mixture_brings_less_than_two_hints_one_after_the_other(made):
    """And leaves fewer misses than a hint that names what has a page, even of a random model."""
    found = {}
    for hint in ("previous_step", ("ema", "next_query"), "mixture"):
        fast = made("llama", mode="exact", hint=hint, page_ratio=2.0)
        made.logits(fast, 24)
        total = fast.sparda.stats().total
        found[hint] = total.misses, total.h2d_bytes
    assert found["mixture"][0] < 0.95 * found["previous_step"][0]
    assert found["mixture"][1] < 0.9 * found["ema", "next_query"][1]


def test_the_predictor_names_what_the_last_step_read_no_longer(made):
    """Else it would be `previous_step`, whose blocks are there but after a prompt."""
    counts = {}
    for hint in ("ema", "previous_step"):
        fast = made("llama", mode="exact", hint=hint)
        made.logits(fast, STEPS)
        total = fast.sparda.stats().total
        block = 2 * 16 * 16 * 4
        counts[hint] = total.h2d_bytes // block - total.misses
    assert counts["ema"] > 2 * counts["previous_step"]
