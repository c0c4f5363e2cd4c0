from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparda_compile.isa.engines import DeferredEngine, use_engine
from sparda_compile.kernels.select_blocks import (
    all_blocks,
    select_blocks,
    select_blocks_reference,
)


def selected(scores, length, num_selected, sink=1, local=2, size=16):
    """Return the definition, with lists: forced blocks, then the best, ties to the lower id."""
    current = length // size
    exist = range(min(current + 1, len(scores)))
    forced = [m for m in exist if m < sink or m >= current - local]
    others = sorted((m for m in exist if m not in forced), key=lambda m: (-scores[m], m))
    ids = sorted(forced + others[: num_selected - len(forced)])
    return ids + [-1] * (num_selected - len(ids))


@given(
    num_blocks=st.sampled_from([1, 2, 7, 37]),
    sink=st.integers(0, 3),
    local=st.integers(0, 3),
    top_k=st.integers(0, 40),
    seed=st.integers(0, 500),
)
def test_selection_follows_the_definition(num_blocks, sink, local, top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    # Few values, so there are many ties; some blocks have no summary.
    scores = torch.randint(-2, 3, (2, 3, num_blocks), generator=generator).float()
    scores[torch.rand(scores.shape, generator=generator) < 0.2] = -math.inf
    lengths = torch.randint(0, num_blocks * 16, (2,), generator=generator).int()
    num_selected = min(num_blocks, sink + local + 1 + top_k)
    ids = select_blocks(scores, lengths, num_selected, 16, sink, local)
    assert ids.dtype == torch.int32
    for row in range(2):
        for group in range(3):
            want = selected(
                scores[row, group].tolist(), int(lengths[row]), num_selected, sink, local
            )
            assert ids[row, group].tolist() == want


@pytest.mark.parametrize("value", [0.0, -math.inf, 3e38, -3e38, math.nan])
def test_ties_go_to_the_lower_id(value):
    scores = torch.full((1, 1, 37), value)
    ids = select_blocks(scores, torch.tensor([36 * 16]), 6, 16, 1, 1)
    assert ids.tolist() == [[[0, 1, 2, 3, 35, 36]]]


def test_forced_blocks_beat_infinite_scores_and_scored_ones_beat_unscored():
    scores = torch.full((1, 1, 10), -math.inf)
    scores[0, 0, 4], scores[0, 0, 6] = torch.finfo(torch.float32).min, math.inf
    ids = select_blocks(scores, torch.tensor([9 * 16 + 5]), 5, 16, 1, 1)
    assert ids.tolist() == [[[0, 1, 6, 8, 9]]]
    scores[0, 0, 4] = -1e30
    ids = select_blocks(scores, torch.tensor([9 * 16 + 5]), 5, 16, 1, 1)
    assert ids.tolist() == [[[0, 4, 6, 8, 9]]]


def test_a_score_that_is_nan_is_that_of_no_summary():
    """A key that is NaN makes all scores of its group NaN: forced blocks are read all the same."""
    scores = torch.tensor([[[math.nan, 1.0, math.nan, -3e38, -math.inf, math.nan]]])
    for count, want in ((2, [0, 5]), (3, [0, 1, 5]), (4, [0, 1, 3, 5]), (5, [0, 1, 2, 3, 5])):
        ids = select_blocks(scores, torch.tensor([5 * 16], dtype=torch.int32), count, 16, 1, 0)
        assert ids.tolist() == [[want]]


def test_published_counts():
    scores = torch.randn(1, 1, 200)
    ids = select_blocks(scores, torch.tensor([64 * 150 + 9]), 96, 64, 1, 32)[0, 0]
    assert ids[0] == 0
    assert ids[-33:].tolist() == list(range(118, 151))
    assert set(ids[1:-33].tolist()) == set((scores[0, 0, 1:118].topk(62).indices + 1).tolist())


def test_no_local_blocks_still_keeps_the_current_one():
    ids = select_blocks(torch.arange(5.0).neg()[None, None], torch.tensor([79]), 2, 16, 0, 0)
    assert ids.tolist() == [[[0, 4]]]


def test_copy_stream_fills_the_ids_when_it_runs():
    scores = torch.randn(1, 1, 5)
    with use_engine(DeferredEngine()) as engine:
        ids = select_blocks(scores, torch.tensor([40]), 2, 16, 0, 1, 1)
        assert engine.num_pending == 1
        assert ids.eq(torch.iinfo(torch.int32).min).all()
        engine.record(0)
        engine.wait(0)
    assert ids.tolist() == [[[1, 2]]]


@pytest.mark.parametrize("lengths", [[0, 15], [16, 95]])
def test_all_blocks_are_those_that_exist(lengths):
    table = torch.zeros(2, 3, 6, dtype=torch.int32)
    ids = all_blocks(table, torch.tensor(lengths, dtype=torch.int32), 16)
    assert ids.dtype == torch.int32
    for row, length in enumerate(lengths):
        want = [m if m <= length // 16 else -1 for m in range(6)]
        assert ids[row].tolist() == [want] * 3


def test_of_some_blocks_alone_the_best_are_picked():
    """Others are not there, even where a score is no number."""
    scores = torch.tensor([[[0.0, 9.0, 3.0, math.nan, 8.0, 2.0, 0.0]]])
    among = torch.tensor([[[True, False, True, True, False, True, True]]])
    length = torch.tensor([100], dtype=torch.int32)
    ids = [select_blocks_reference(scores, length, k, 16, 1, 0, among).tolist() for k in (4, 5)]
    assert ids == [[[[0, 2, 5, 6]]], [[[0, 2, 3, 5, 6]]]]
