"""Selector `nosa` against loops: which blocks are read, not which scores they have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparda_compile.kernels.select_blocks import select_blocks_reference
from sparda_compile.selectors.base import Geometry
from sparda_compile.selectors.nosa import Nosa, NosaForecast

SIZE, POOL, STRIDE, DIM = 16, 8, 4, 5


def geometry_of(num_blocks, short_list, sink, local):
    return Geometry(num_blocks, SIZE, POOL, STRIDE, short_list, sink, local)


def summary(num_blocks, batch=1, groups=1, seed=0):
    """Return pooled keys of random windows, of which the last channel is retention's."""
    generator = torch.Generator().manual_seed(seed)
    windows = geometry_of(num_blocks, 0, 0, 0).num_windows
    return torch.randn(batch, groups, windows, DIM, generator=generator), generator


def picked(rule, query, pooled, lengths, scale, geometry, top_k):
    """Return the ids that the selector and the select op pick, by row and group."""
    lengths_B = torch.tensor(lengths, dtype=torch.int32)
    scores = rule.score(query, [pooled], lengths_B, scale, geometry)
    assert scores.dtype == torch.float32
    assert not scores.isnan().any()
    assert not scores.eq(math.inf).any()
    sink, local = geometry.sink_blocks, geometry.local_blocks
    budget = min(geometry.num_blocks, sink + local + 1 + top_k)
    ids = select_blocks_reference(scores, lengths_B, budget, SIZE, sink, local)
    return [[[i for i in group if i >= 0] for group in row] for row in ids.tolist()]


def block_score(window_scores, block):
    """Return the best score of the windows that share a token with a block."""
    touching = [
        score
        for j, score in enumerate(window_scores)
        if j * STRIDE < (block + 1) * SIZE and j * STRIDE + POOL > block * SIZE
    ]
    return max(touching, default=-math.inf)


def asked_by_query(queries, windows, scale):
    """Return each window's softmax weight, summed over the heads of the group."""
    total = [0.0] * len(windows)
    for query in queries:
        weights = [
            math.exp(scale * sum(a * b for a, b in zip(query, w[:-1], strict=True)))
            for w in windows
        ]
        total = [t + w / sum(weights) for t, w in zip(total, weights, strict=True)]
    return total


def wanted(asked, windows, length, geometry, top_k):
    """Return the ids of one group, picked one after another."""
    current = length // SIZE
    local = range(max(current - geometry.local_blocks, 0), current + 1)
    chosen = {*range(min(geometry.sink_blocks, current + 1)), *local}
    budget = geometry.sink_blocks + geometry.local_blocks + 1 + top_k
    by_query = [block_score(asked, m) for m in range(current + 1)]
    by_worth = [block_score([w[-1] for w in windows], m) for m in range(current + 1)]
    for turn in range(budget - len(chosen)):
        left = [m for m in range(current + 1) if m not in chosen]
        if left:
            values = by_query if turn < geometry.short_list else by_worth
            chosen.add(max(left, key=lambda m: (values[m], -m)))
    return sorted(chosen)


def check(rule, query, pooled, lengths, scale, geometry, top_k):
    got = picked(rule, query, pooled, lengths, scale, geometry, top_k)
    groups = pooled.shape[1]
    for row, length in enumerate(lengths):
        whole = max((length - POOL) // STRIDE + 1, 0)
        for group in range(groups):
            windows = pooled[row, group, :whole].tolist()
            heads = query[row, :, 0, :-1].unflatten(0, (groups, -1))[group].tolist()
            if isinstance(rule, NosaForecast):
                asked = [sum(a * b for a, b in zip(heads[0], w, strict=False)) for w in windows]
            else:
                asked = asked_by_query(heads, windows, scale)
            assert got[row][group] == wanted(asked, windows, length, geometry, top_k)


@given(
    lengths=st.lists(st.integers(0, 16 * SIZE - 1), min_size=1, max_size=3),
    top_k=st.integers(0, 8),
    share=st.floats(0, 1),
    sink=st.integers(0, 2),
    local=st.integers(0, 3),
    is_forecast=st.booleans(),
    seed=st.integers(0, 999),
)
def test_blocks_are_those_of_the_loops(lengths, top_k, share, sink, local, is_forecast, seed):
    """Ragged batches, from caches without a window to full ones."""
    geometry = geometry_of(16, round(share * top_k), sink, local)
    pooled, generator = summary(16, len(lengths), 2, seed)
    heads = 2 if is_forecast else 6
    query = torch.randn(len(lengths), heads, 1, DIM, generator=generator)
    rule = NosaForecast() if is_forecast else Nosa()
    check(rule, query, pooled, lengths, 0.7, geometry, top_k)


@given(seed=st.integers(0, 999), short_list=st.integers(0, 6))
def test_ties_go_to_the_lower_id(seed, short_list):
    """Small whole numbers tie often, and their products are exact."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randint(-1, 2, summary(12)[0].shape, generator=generator).float()
    query = torch.randint(-1, 2, (1, 1, 1, DIM), generator=generator).float()
    geometry = geometry_of(12, short_list, 1, 1)
    check(NosaForecast(), query, pooled, [12 * SIZE - 3], 1.0, geometry, 6)


def test_published_budget_of_96_blocks():
    """1 sink, 16 local and the current block, 23 by the query, 55 by retention."""
    pooled, generator = summary(300)
    query = torch.randn(1, 4, 1, DIM, generator=generator)
    length = 300 * SIZE - 1
    geometry = geometry_of(300, 23, 1, 16)
    check(Nosa(), query, pooled, [length], 0.5, geometry, 78)
    (both,) = picked(Nosa(), query, pooled, [length], 0.5, geometry, 78)[0]
    (asked,) = picked(Nosa(), query, pooled, [length], 0.5, geometry, 23)[0]
    assert (len(asked), len(both)) == (41, 96)
    assert set(asked) < set(both)


def test_query_part_does_not_see_retention():
    pooled, generator = summary(8)
    query = torch.randn(1, 2, 1, DIM, generator=generator)
    geometry = geometry_of(8, 2, 1, 1)
    before = picked(Nosa(), query, pooled, [127], 1.0, geometry, 2)
    pooled[..., -1] *= -100
    query[..., -1] = 7
    assert picked(Nosa(), query, pooled, [127], 1.0, geometry, 2) == before


def test_retention_part_does_not_see_the_query():
    pooled, generator = summary(8)
    geometry = geometry_of(8, 0, 1, 1)
    found = []
    for rule in (Nosa(), NosaForecast()):
        query = torch.randn(1, 1, 1, DIM, generator=generator)
        found.append(rule.score(query, [pooled], torch.tensor([127]), 1.0, geometry))
    assert torch.equal(*found)


def test_same_short_list_gives_the_same_scores():
    """A Forecast that is the query asks for the same blocks, and retention adds the same."""
    pooled, generator = summary(20, groups=2)
    query = torch.randn(1, 2, 1, DIM, generator=generator)
    geometry = geometry_of(20, 4, 1, 2)
    lengths = torch.tensor([311])
    by_query, by_forecast = (
        rule.score(query, [pooled], lengths, 0.3, geometry) for rule in (Nosa(), NosaForecast())
    )
    assert torch.equal(by_query, by_forecast)
    listed = by_query == by_query.max()
    assert listed.sum(-1).tolist() == [[4, 4]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_ranked_as_it_stands(dtype):
    pooled, generator = summary(20)
    query = torch.randn(1, 1, 1, DIM, generator=generator).to(dtype)
    pooled = pooled.to(dtype)
    geometry = geometry_of(20, 3, 1, 1)
    half = NosaForecast().score(query, [pooled], torch.tensor([319]), 1.0, geometry)
    whole = NosaForecast().score(
        query.float(), [pooled.float()], torch.tensor([319]), 1.0, geometry
    )
    assert torch.equal(half, whole)


def test_blocks_without_a_window_score_minus_infinity():
    pooled, generator = summary(4)
    query = torch.randn(1, 1, 1, DIM, generator=generator)
    for length, scored in ((0, 0), (7, 0), (8, 1), (20, 2), (63, 4)):
        windows = max((length - POOL) // STRIDE + 1, 0)
        seen = pooled.clone()
        seen[:, :, windows:] = math.nan
        got = NosaForecast().score(
            query, [seen], torch.tensor([length]), 1.0, geometry_of(4, 2, 0, 0)
        )
        assert int(got.isfinite().sum()) == scored
        assert got[~got.isfinite()].eq(-math.inf).all()


@pytest.mark.parametrize("rule", [Nosa(), NosaForecast()])
def test_score_reads_no_value_and_stays_on_its_device(rule):
    """So a CUDA graph can hold it: a meta tensor has a shape and a device, and nothing to read."""
    pooled = torch.empty(3, 2, geometry_of(16, 0, 0, 0).num_windows, DIM, device="meta")
    query = torch.empty(3, 2, 1, DIM, device="meta")
    lengths = torch.empty(3, dtype=torch.int32, device="meta")
    scores = rule.score(query, [pooled], lengths, 1.0, geometry_of(16, 3, 1, 2))
    assert scores.shape == (3, 2, 16)
    assert scores.device.type == "meta"
