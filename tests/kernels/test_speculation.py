"""Speculation against fp64 attention; what was predicted changes what is read, and no result."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparda_compile.isa.counters import COUNTERS, REPAIRED, WASTED
from sparda_compile.kernels.predict_blocks import predict_blocks_reference
from sparda_compile.kernels.speculation import (
    attend_predicted,
    find_predicted,
    predict_ahead,
    repair_predicted,
)

SIZE, DIM, REPEAT, NAN, INF = 16, 20, 3, float("nan"), float("inf")
SELECTED = 4


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


class Case:
    """Two sequences, of ten blocks and of three, whose blocks are in pages of any order."""

    def __init__(self, dtype=torch.float32, seed=0, num_blocks=10):
        self.random = torch.Generator().manual_seed(seed)
        self.lengths = int32([num_blocks * SIZE - 4, 2 * SIZE])
        shape = (2, 2, num_blocks + 1, 2, SIZE, DIM)
        self.pages = torch.full(shape, NAN, dtype=dtype)
        query = torch.randn(2, 2 * REPEAT, 1, DIM, generator=self.random)
        self.query = query.to(dtype)
        self.table = torch.full((2, 2, num_blocks), -1, dtype=torch.int32)
        self.block_ids = torch.full((2, 2, SELECTED), -1, dtype=torch.int32)
        for row, group in self.pairs():
            current = self.current(row)
            order = torch.randperm(num_blocks + 1, generator=self.random)[: current + 1]
            self.table[row, group, : current + 1] = order.int()
            kv = torch.randn(current + 1, 2, SIZE, DIM, generator=self.random).to(dtype)
            kv[-1, :, int(self.lengths[row]) % SIZE + 1 :] = NAN
            self.pages[row, group, order] = kv
            others = torch.randperm(current, generator=self.random)[: SELECTED - 1].sort().values
            ids = torch.cat([others, torch.tensor([current])])
            self.block_ids[row, group, : len(ids)] = ids.int()

    def pairs(self):
        return [(row, group) for row in range(2) for group in range(2)]

    def current(self, row):
        return int(self.lengths[row]) // SIZE

    def predicted(self, pick, width=9):
        """Return what `pick(selected, current)` says, ascending, then -1."""
        predicted = torch.full((2, 2, width), -1, dtype=torch.int32)
        for row, group in self.pairs():
            own = [i for i in self.block_ids[row, group].tolist() if i >= 0]
            ids = sorted(set(pick(own, self.current(row))))[:width]
            predicted[row, group, : len(ids)] = int32(ids)
        return predicted

    def run(self, predicted, *, union=False, pages=None, softcap=0.0):
        """Return the result, the partials, and blocks repaired and wasted."""
        early = self.pages if pages is None else pages
        page_ids = self.table.gather(-1, self.block_ids.clamp(min=0).long())
        counters = torch.zeros(len(COUNTERS), dtype=torch.int64)
        partial = attend_predicted(
            self.query, early, self.table, predicted, self.lengths, 0.3, softcap
        )
        out = repair_predicted(
            self.query, self.pages, page_ids, self.block_ids, predicted, self.lengths, *partial,
            counters, 0.3, softcap, union,
        )  # fmt: skip
        return out, partial, (int(counters[REPAIRED]), int(counters[WASTED]))

    def truth(self, wanted, softcap=0.0):
        """Return fp64 attention to `wanted(row, group)`, a set of blocks: [B, H, 1, D]."""
        outs = []
        for row, group in self.pairs():
            length = int(self.lengths[row]) + 1
            kept = [
                self.pages[row, group, self.table[row, group, i], :, : length - i * SIZE]
                for i in sorted(wanted(row, group))
            ]
            keys, values = torch.cat(kept, dim=1).double()
            scores = self.query[row].unflatten(0, (2, -1))[group, :, 0].double() @ keys.T * 0.3
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            outs.append(scores.softmax(-1) @ values)
        return torch.stack(outs).unflatten(0, (2, 2)).flatten(1, 2)[:, :, None]

    def selected(self, row, group):
        return {i for i in self.block_ids[row, group].tolist() if i >= 0}


PREDICTIONS = {
    "nothing": lambda own, current: [],
    "some": lambda own, current: [*own[::2], 0],
    "all": lambda own, current: own[:-1],
    "others": lambda own, current: set(range(current)) - set(own),
    "more": lambda own, current: range(current),
    # The block of the new token, and one that is not there yet: neither counts.
    "ahead": lambda own, current: [*own[1:], current, current + 1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_result_is_attention_to_what_was_selected(assert_near, name, dtype):
    case = Case(dtype)
    got, _, _ = case.run(case.predicted(PREDICTIONS[name]), softcap=2.0)
    assert got.dtype == dtype
    assert_near(got, case.truth(case.selected, 2.0), dtype)


@given(seed=st.integers(0, 1000), softcap=st.sampled_from([0.0, 4.0]))
def test_a_prediction_changes_no_bit(seed, softcap):
    """NaN in all that was not selected, which a wasted prediction reads."""
    case = Case(seed=seed)
    want, _, _ = case.run(case.predicted(PREDICTIONS["nothing"], 1), softcap=softcap)
    pages = torch.full_like(case.pages, NAN)
    for row, group in case.pairs():
        at = case.table[row, group, sorted(case.selected(row, group))].long()
        pages[row, group, at] = case.pages[row, group, at]
    for pick in PREDICTIONS.values():
        got, _, _ = case.run(case.predicted(pick), pages=pages, softcap=softcap)
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_union_is_attention_to_both(assert_near, name):
    case = Case()
    predicted = case.predicted(PREDICTIONS[name])

    def both(row, group):
        early = {i for i in predicted[row, group].tolist() if 0 <= i < case.current(row)}
        return case.selected(row, group) | early

    got, _, _ = case.run(predicted, union=True)
    assert_near(got, case.truth(both), torch.float32)


@pytest.mark.parametrize("union", [False, True])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_what_is_repaired_and_wasted_is_counted(name, union):
    case = Case()
    predicted = case.predicted(PREDICTIONS[name])
    repaired = wasted = 0
    for row, group in case.pairs():
        early = {i for i in predicted[row, group].tolist() if 0 <= i < case.current(row)}
        repaired += len(case.selected(row, group) - early)
        wasted += len(early - case.selected(row, group))
    assert case.run(predicted, union=union)[2] == (repaired, wasted)
    assert repaired > 0  # the block of the new token at least


def test_partials_of_what_does_not_count_are_nothing():
    case = Case()
    predicted = case.predicted(PREDICTIONS["ahead"])
    _, (out, lse), _ = case.run(predicted)
    counts = (predicted >= 0) & (predicted < (case.lengths // SIZE)[:, None, None])
    assert out.shape == (2, 2, 9, REPEAT, DIM)
    assert out.dtype == lse.dtype == torch.float32
    assert (lse > -INF).all(-1).equal(counts)
    assert (lse == -INF).all(-1).equal(~counts)


def test_places_among_the_predicted():
    block_ids, predicted = int32([[[0, 3, 5, 6, -1]]]), int32([[[3, 4, 6, -1]]])
    place = find_predicted(block_ids, predicted, int32([6 * SIZE]), SIZE)
    assert place.tolist() == [[[-1, 0, -1, -1, -1]]]  # 6 is the block of the new token
    place = find_predicted(block_ids, predicted, int32([7 * SIZE]), SIZE)
    assert place.tolist() == [[[-1, 0, -1, 2, -1]]]


@pytest.mark.parametrize("budget", [-1, 0, 1, 3, 6, 50])
def test_a_prediction_keeps_to_its_budget(budget):
    """Ascending, and the best of them; sink and local blocks first."""
    generator = torch.Generator().manual_seed(3)
    level, trend = (torch.randn(2, 2, 20, generator=generator) for _ in range(2))
    lengths, width = int32([19 * SIZE, 5 * SIZE - 1]), 6
    predicted = torch.full((2, 2, width), -77, dtype=torch.int32)
    predict_ahead(level, trend, lengths, int32([budget]), predicted, 1, SIZE, 1, 2, 0.5)
    room = min(max(budget, 0), width)
    choice = (room, SIZE, 1, 2)
    want = predict_blocks_reference(level, trend, lengths + 1, choice, 0.5)
    assert torch.equal(predicted[..., :room], want)
    assert predicted[..., room:].eq(-1).all()
    if budget == 3:
        assert predicted[0, 0].tolist() == [0, 17, 18, -1, -1, -1]
