from __future__ import annotations

import pytest

from sparda_compile import SpardaConfig, optimize
from sparda_compile.forecast.weights import projections_of
from sparda_compile.graph.nodes import find_ops
from sparda_compile.graph.tags import LAYER
from sparda_compile.module.optimized import OptimizedModule
from sparda_compile.testing import build, random_forecast

SMALL = {
    "block_size": 16,
    "pool_size": 8,
    "pool_stride": 4,
    "local_blocks": 1,
    "top_k": 2,
    "max_tokens": 256,
    "lowering": "eager",
}


class Lab:
    """One traced model of three layers, optimized in any mode."""

    def __init__(self):
        self.model = build("qwen3", seed=2)
        projections = random_forecast(self.model, seed=1)
        self.num_layers = self.model.config.num_hidden_layers
        last = self.num_layers - 1
        self.forecast = {0: projections["bootstrap"]}
        self.forecast |= {layer + 1: projections[layer] for layer in range(last)}
        config = SpardaConfig(mode="query", **SMALL)
        self.captures = optimize(self.model, config).captures

    def module(self, forecast=None, **config):
        config = SpardaConfig(**SMALL, **config)
        given = (forecast or self.forecast) if config.needs_forecast else {}
        return OptimizedModule(self.captures, config, projections_of(given))

    def decode_graph(self, after, **config):
        module = self.module(**config)
        return module.programs.get("decode", 1, 256, last_only=True).plan.stage(after).graph

    def ops(self, graph, name):
        """Return an op's nodes by layer."""
        return {LAYER.of(node): node for node in find_ops(graph, name)}


@pytest.fixture(scope="session")
def lab():
    return Lab()
