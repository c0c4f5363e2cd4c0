"""Compiled programs on streams that are as late as the waits allow equal themselves undelayed.

What Inductor makes of a piece may round otherwise than eager does, so each program is its own
reference. Every mode, hint, selector, batch size and family comes with late copies here, in pairs;
with SPARDA_MATRIX=all in the environment every mode meets every family at every batch size.
"""

from __future__ import annotations

import functools
import itertools
import os
from types import SimpleNamespace

import pytest
import torch
from torch._functorch import config as functorch_config

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import TransferRaceError
from sparda_compile.forecast.weights import projections_of
from sparda_compile.isa.engines import DeferredEngine, ImmediateEngine, use_engine
from sparda_compile.module.optimized import OptimizedModule
from sparda_compile.testing import random_forecast, tiny_nosa

SMALL = {
    "block_size": 16, "pool_size": 8, "pool_stride": 4, "top_k": 3, "local_blocks": 1,
    "max_tokens": 512, "page_ratio": 1.0, "machine": "h200", "lowering": "inductor",
    "attend_before_repair": "always",
}  # fmt: skip
PROMPT, STEPS = 200, 18
SEEDS = (None, 0, 1)
MODES = {
    "query": {"mode": "query"},
    "query, quest": {"mode": "query", "selector": "quest"},
    "forecast": {"mode": "forecast"},
    "exact": {"mode": "exact", "hint": "forecast"},
    "exact, quest": {"mode": "exact", "hint": "forecast", "selector": "quest"},
    "previous_step": {"mode": "exact", "hint": "previous_step"},
    "previous_layer": {"mode": "exact", "hint": "previous_layer"},
    "next_query": {"mode": "exact", "hint": "next_query"},
    "ema": {"mode": "exact", "hint": "ema", "selector": "quest"},
    "ema, forecast": {"mode": "exact", "hint": ("ema", "forecast")},
    "forecast, lowbit2": {"mode": "forecast", "selector": "lowbit2"},
    "exact, lowbit4": {"mode": "exact", "hint": ("ema", "forecast"), "selector": "lowbit4"},
    "exact, nosa": {"mode": "exact", "selector": "nosa", "short_list": 2},
    "exact, int4": {"mode": "exact", "hint": "previous_step", "kv_format": "int4"},
    "exact, small pages": {
        "mode": "exact",
        "hint": "forecast",
        "kv_format": "fp8",
        "page_format": "stored",
    },
}
FAMILIES = ("llama", "qwen3", "glm4", "phi3", "mistral", "minicpm4")
BATCH_SIZES = (1, 2, 4)
PAIRS = [
    ("forecast", "llama", 1),
    ("next_query", "qwen3", 4),
    ("query, quest", "glm4", 2),
    ("exact", "phi3", 1),
    ("previous_step", "mistral", 2),
    ("previous_layer", "minicpm4", 1),
    ("exact, quest", "llama", 4),
    ("query", "qwen3", 1),
    ("ema", "qwen3", 2),
    ("ema, forecast", "llama", 2),
    ("forecast, lowbit2", "mistral", 2),
    ("exact, lowbit4", "phi3", 2),
    ("exact, nosa", "nosa", 2),
    ("exact, int4", "llama", 2),
    ("exact, small pages", "qwen3", 2),
]
# NOSA scores by a channel that only its own models have.
ALL = [
    (mode, "nosa" if mode == "exact, nosa" else family, batch_size)
    for mode, family, batch_size in itertools.product(MODES, FAMILIES, BATCH_SIZES)
    if mode != "exact, nosa" or family == "llama"
]


class Steps:
    """Decode steps of one program on one cache, from the same state each time.

    The prompt is read by the same model's eager program.
    """

    def __init__(self, fast, eager, batch_size):
        generator = torch.Generator().manual_seed(batch_size)
        self.tokens = torch.randint(2, 250, (batch_size, PROMPT + STEPS), generator=generator)
        self.cache = eager.new_cache()
        eager(self.tokens[:, :PROMPT], past_key_values=self.cache)
        self.before = {name: t.clone() for name, t in self.cache.kv.state.items()}
        self.program, self.eager = (
            module.programs.get("decode", batch_size, SMALL["max_tokens"], last_only=True)
            for module in (fast, eager)
        )

    def run(self, engine, program=None):
        program = program or self.program
        for name, tensor in self.cache.kv.state.items():
            tensor.copy_(self.before[name])
        logits = []
        with use_engine(engine):
            for place in range(PROMPT, PROMPT + STEPS):
                ids = self.tokens[:, place : place + 1].clone()
                positions = torch.full_like(ids, place)
                logits.append(program(ids, positions, None, self.cache.kv).clone())
        return torch.stack(logits)


@functools.cache
def nosa():
    model = tiny_nosa()
    fast = optimize(model, SpardaConfig(mode="dense", lowering="eager"))
    return SimpleNamespace(model=model, fast=fast)


@pytest.fixture(autouse=True)
def _every_piece_is_kept():
    """Raise where a piece is one that a second process could not find on disk."""
    with functorch_config.patch(strict_autograd_cache=True):
        yield


@pytest.fixture
def steps(traced):
    def of(mode, family, batch_size):
        base = traced(family, "sdpa") if family != "nosa" else nosa()
        config = SpardaConfig(**{**SMALL, **MODES[mode]})
        forecast = {}
        if config.needs_forecast:
            weights = random_forecast(base.model, seed=1)
            given = {0 if key == "bootstrap" else key + 1: w for key, w in weights.items()}
            forecast = projections_of(given)
        fast, eager = (
            OptimizedModule(base.fast.captures, config.replace(lowering=lowering), forecast)
            for lowering in ("inductor", "eager")
        )
        return Steps(fast, eager, batch_size)

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "family", "batch_size"), ALL if os.environ.get("SPARDA_MATRIX") == "all" else PAIRS
)
def test_late_streams_change_nothing(steps, mode, family, batch_size):
    mine = steps(mode, family, batch_size)
    undelayed = mine.run(ImmediateEngine())
    eager = mine.run(ImmediateEngine(), mine.eager)
    torch.testing.assert_close(undelayed, eager, rtol=1e-3, atol=1e-3)
    for seed in SEEDS:
        engine = DeferredEngine(seed)
        assert torch.equal(mine.run(engine), undelayed), f"seed {seed}"
        assert engine.num_pending == 0
    proof = mine.program.proof
    assert proof.conflicts > 0
    assert proof.storages > 0


@pytest.mark.slow
def test_late_streams_change_no_prompt(traced):
    """The offloads of a prefill end a layer later, or when the prompt has been read."""
    config = SpardaConfig(**{**SMALL, "mode": "query"})
    fast = OptimizedModule(traced("llama", "sdpa").fast.captures, config, {})
    ids = torch.randint(2, 250, (1, 333))
    found = []
    for engine in (ImmediateEngine(), *map(DeferredEngine, SEEDS)):
        with use_engine(engine):
            cache = fast.new_cache()
            logits = [fast(ids[:, :250], past_key_values=cache).logits]
            logits.append(fast(ids[:, 250:], past_key_values=cache).logits)
        state = {name: t.clone() for name, t in cache.kv.state.items() if "counters" not in name}
        found.append((torch.cat(logits, 1), state))
    want, want_state = found[0]
    for got, state in found[1:]:
        assert torch.equal(got, want)
        assert all(torch.equal(state[name], want_state[name]) for name in state)


def test_pairs_have_every_one_of_each():
    for place, every in enumerate((MODES, (*FAMILIES, "nosa"), BATCH_SIZES)):
        assert {pair[place] for pair in PAIRS} == set(every)


def test_a_hold_that_is_dropped_behind_the_verifier_is_found(steps):
    """The defect that was: what the select stream reads went to a matmul before its wait."""
    mine = steps("forecast", "llama", 1)
    for call in mine.program.lowered.calls:
        if call.name.startswith("wait_blocks"):
            call.args = (*call.args[:2], [], *call.args[3:])
    with pytest.raises(TransferRaceError, match="lowered program: wait_blocks"):
        mine.run(ImmediateEngine())
