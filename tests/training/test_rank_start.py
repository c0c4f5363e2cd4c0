"""The start of one rank's heads; two ranks gather theirs in tests/e2e/test_ranks.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.forecast.projection import ProjectionShape
from sparda_compile.forecast.start import initial_forecast
from sparda_compile.ranks.agreement import Ranks
from sparda_compile.training import rank_start
from sparda_compile.training.rank_start import traced_config, whole_start
from sparda_compile.training.taps import tap_forward


@pytest.fixture
def pair(gym, monkeypatch):
    """The model's captures, as if a second rank had other heads: the same ones, doubled."""
    monkeypatch.setattr(gym.captures, "ranks", Ranks(2, 0, "pair"))
    monkeypatch.setattr(rank_start, "splits_heads", lambda model: True)
    monkeypatch.setattr(rank_start, "all_gather", lambda x, size, group: torch.cat([x, 2 * x]))
    return gym


def test_one_process_starts_as_ever(gym):
    forward = tap_forward(gym.captures, gym.config, 1)
    assert traced_config(gym.captures, gym.config) is gym.config
    start = whole_start(gym.captures, forward, gym.config)
    captured = gym.captures.get("prefill", last_logits_only=True)
    graph = forward.graph_module.graph
    wanted = initial_forecast(graph, forward.sites, forward.shapes, captured, torch.float32)
    for layer, weight in wanted.items():
        assert torch.equal(start[layer].product(), weight.product())


@pytest.mark.parametrize(("rank", "heads"), [(None, 1), (4, 1), (4, 2)])
def test_all_heads_are_gathered_and_cut_to_the_rank_of_all(pair, rank, heads):
    whole = pair.config.replace(forecast_heads=heads)
    config = whole.replace(forecast_rank=rank)
    traced = traced_config(pair.captures, config)
    assert traced.forecast_rank == rank
    start = whole_start(pair.captures, tap_forward(pair.captures, traced, 1), config)
    full = whole_start(pair.captures, tap_forward(pair.captures, whole, 1), whole)
    for layer, weight in full.items():
        upper, lower = weight.product().chunk(2)
        assert torch.equal(lower, 2 * upper)
        assert start[layer].shape == ProjectionShape(64 * heads, 64, rank)
        if rank is None:
            assert torch.equal(start[layer].product(), weight.product())


def test_heads_that_all_have_are_not_gathered(pair, monkeypatch):
    monkeypatch.setattr(rank_start, "splits_heads", lambda model: False)
    start = whole_start(pair.captures, tap_forward(pair.captures, pair.config, 1), pair.config)
    assert {weight.shape.rows for weight in start.values()} == {32}


def test_layers_of_different_ranks_are_refused(pair, monkeypatch):
    shapes = iter([None, 16])
    made = partial(ProjectionShape, 64, 64)
    monkeypatch.setattr(rank_start, "_whole", lambda *_: made(next(shapes)))
    with pytest.raises(UnsupportedInputError, match="get Forecasts of different ranks"):
        traced_config(pair.captures, pair.config)
