"""Chains of two hints at places of their own give the bits of mode `query`, however late."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.forecast.weights import projections_of
from sparda_compile.graph.nodes import program_order
from sparda_compile.graph.tags import HINT
from sparda_compile.isa.engines import DeferredEngine, ImmediateEngine, use_engine
from sparda_compile.module.optimized import OptimizedModule
from sparda_compile.passes.schedule import schedule_transfers
from sparda_compile.testing import random_forecast, tiny_llama

SMALL = {
    "block_size": 16, "pool_size": 8, "pool_stride": 4, "top_k": 3, "local_blocks": 1,
    "max_tokens": 512, "page_ratio": 1.0, "machine": "h200", "lowering": "eager",
}  # fmt: skip
LAYERS = 4
PROMPT, STEPS = 120, 12
LAST = 99  # whatever the last place is: for EMA the beginning of the step
# Number of the place of each hint; those of EMA are two for each of 1, 2 and 4 layers ahead.
PLACES = {
    "two layers ahead, behind attention": (3, 0),
    "at the beginning": (LAST, 0),
    "one before and one behind attention": (0, 1),
    "far apart": (LAST, LAST),
}


@pytest.fixture(scope="module")
def lab():
    model = tiny_llama(num_hidden_layers=LAYERS)
    query = optimize(model, SpardaConfig(**SMALL, mode="query"))
    weights = random_forecast(model, seed=1)
    given = {0 if key == "bootstrap" else key + 1: each for key, each in weights.items()}
    return query, projections_of(given)


def run(module, engine):
    ids = torch.randint(2, 250, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))
    with use_engine(engine):
        cache = module.new_cache()
        logits = [module(ids[:, :PROMPT], past_key_values=cache).logits[:, -1]]
        for place in range(PROMPT, PROMPT + STEPS):
            step = module(ids[:, place : place + 1], past_key_values=cache)
            logits.append(step.logits[:, -1].clone())
    return torch.stack(logits)


@pytest.mark.parametrize("attends", ["auto", "always"])
@pytest.mark.parametrize("places", PLACES)
def test_places_of_two_hints_change_nothing(lab, monkeypatch, places, attends):
    query, forecast = lab
    numbers = dict(zip(("ema", "forecast"), PLACES[places], strict=True))
    most = 9  # all stages on the select stream

    def choose(graph, dag, chains, ctx):
        return [(numbers[HINT.of(chain.prefetch)], most) for chain in chains]

    monkeypatch.setattr(schedule_transfers, "choose_places", choose)
    settings = {"mode": "exact", "hint": ("ema", "forecast"), "attend_before_repair": attends}
    module = OptimizedModule(query.captures, SpardaConfig(**{**SMALL, **settings}), forecast)
    want = run(query, ImmediateEngine())
    for seed in (None, 0, 1):
        engine = DeferredEngine(seed)
        assert torch.equal(run(module, engine), want), f"seed {seed}"
        assert engine.num_pending == 0
    order = program_order(
        module.programs.get("decode", 2, 512, last_only=True).plan.graph_module.graph
    )
    at = {node.name: place for node, place in order.items()}
    between = at["hidden_2"]
    assert (at["ema_prefetch_3"] < between) == (places != "one before and one behind attention")
    assert at["forecast_prefetch_3"] > between
