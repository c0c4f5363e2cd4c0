from __future__ import annotations

import pytest
import torch

from sparda_compile.isa.engines import DeferredEngine, use_engine
from sparda_compile.kernels.score_blocks import score_blocks
from sparda_compile.kernels.select_blocks import select_blocks
from sparda_compile.selectors import SELECTORS, Geometry


def sample(selector, num_blocks, dtype, dim=60):
    geometry = Geometry(num_blocks, 16, 8, 4)
    generator = torch.Generator().manual_seed(0)
    summary = SELECTORS[selector].summary
    tensors = [
        torch.randn(2, 3, *shape, generator=generator).to(dtype)
        for shape in summary.shapes(geometry, dim).values()
    ]
    repeat = 1 if selector.endswith("forecast") else 7
    query = torch.randn(2, 3 * repeat, 1, dim, generator=generator).to(dtype)
    lengths = torch.tensor([num_blocks * 16 - 1, num_blocks * 8], dtype=torch.int32)
    return query, tensors, lengths, geometry


def score(selector, query, tensors, lengths, geometry, *, stream=0, trace=None):
    sizes = (geometry.num_blocks, geometry.block_size, geometry.pool_size, geometry.pool_stride)
    return score_blocks(query, tensors, lengths, selector, 0.2, *sizes, stream, trace=trace)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_blocks", [1, 37])
@pytest.mark.parametrize("selector", SELECTORS.names())
def test_half_precision_is_scored_as_its_fp64_value(assert_near, selector, num_blocks, dtype):
    """Formulas are tested beside each selector; here, that no precision is lost on the way."""
    query, tensors, lengths, geometry = sample(selector, num_blocks, dtype)
    got = score(selector, query, tensors, lengths, geometry)
    assert got.dtype == torch.float32
    assert got.shape == (2, 3, num_blocks)
    exact = [t.double().float() for t in tensors]
    want = SELECTORS[selector].score(query.float(), exact, lengths, 0.2, geometry)
    exists = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), exists)
    assert exists.any()
    assert_near(got[exists], want[exists].double(), torch.float32)


@pytest.mark.parametrize("selector", SELECTORS.names())
def test_strided_query_gives_the_same(selector):
    query, tensors, lengths, geometry = sample(selector, 5, torch.float32)
    want = score(selector, query, tensors, lengths, geometry)
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(score(selector, strided, tensors, lengths, geometry), want)


def test_copy_stream_scores_when_it_runs():
    args = sample("quest", 5, torch.float32)
    want = score("quest", *args)
    with use_engine(DeferredEngine()) as engine:
        late = score("quest", *args, stream=1)
        assert late.isnan().all()
        engine.record(0)
        engine.wait(0)
    assert torch.equal(late, want)


@pytest.mark.parametrize("selector", SELECTORS.names())
def test_trace_raises_what_it_names_for_the_step_of_each_row(selector):
    query, tensors, lengths, geometry = sample(selector, 37, torch.float32)
    args = (selector, query, tensors, lengths, geometry)
    plain = score(*args)
    # Lengths 591 and 296: rows 0 and 1 are at steps 1 and 6 of 10.
    trace = torch.zeros(2, 3, 10, 37, dtype=torch.bool)
    trace[0, :, 1, [4, 20, 36]] = True
    trace[1, 2, 6, 36] = True
    trace[0, :, 6] = trace[1, :, 1] = True
    before = trace.clone()
    got = score(*args, trace=trace)
    named = torch.zeros_like(plain, dtype=torch.bool)
    named[0, :, [4, 20, 36]] = True
    named[1, 2, 36] = True
    best = plain[plain.isfinite()].max()
    assert torch.equal(got[~named], plain[~named])
    assert (got[named] > best).all()
    assert got[named].isfinite().all()
    assert torch.equal(trace, before)


def test_blocks_that_a_trace_names_are_selected():
    query, tensors, lengths, geometry = sample("quest", 37, torch.float32)
    generator = torch.Generator().manual_seed(1)
    trace = torch.zeros(2, 3, 4, 37, dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        for group in range(3):
            for step in range(4):
                blocks = 1 + torch.randperm(length // 16 - 3, generator=generator)[:5]
                trace[row, group, step, blocks] = True
    scores = score("quest", query, tensors, lengths, geometry, trace=trace)
    ids = select_blocks(scores, lengths, 8, 16, 1, 1)
    for row, length in enumerate(lengths.tolist()):
        for group in range(3):
            named = trace[row, group, length % 4].nonzero().flatten().tolist()
            forced = {0, length // 16 - 1, length // 16}
            assert set(ids[row, group].tolist()) == forced | set(named)


@pytest.mark.parametrize("selector", ["nosa", "nosa_forecast"])
def test_short_list_is_above_the_rest_and_below_a_trace(selector):
    query, tensors, lengths, geometry = sample(selector, 37, torch.float32)
    sizes = (geometry.num_blocks, geometry.block_size, geometry.pool_size, geometry.pool_stride)
    chosen = {"short_list": 5, "sink_blocks": 2, "local_blocks": 3}
    trace = torch.zeros(2, 3, 1, 37, dtype=torch.bool)
    trace[..., 1] = True
    got, kept, traced = (
        score_blocks(query, tensors, lengths, selector, 0.2, *sizes, **more)
        for more in (chosen, {}, chosen | {"trace": trace})
    )
    listed = got != kept
    assert listed.sum(-1).eq(5).all()
    for row, length in enumerate(lengths.tolist()):
        assert not listed[row, :, :2].any()
        assert not listed[row, :, length // 16 - 3 :].any()
    assert got[listed].isfinite().all()
    assert got[listed].min() > kept[kept.isfinite()].max()
    assert traced[..., 1].min() > got.max()
    ids = select_blocks(got, lengths, 2 + 3 + 1 + 5, 16, 2, 3)
    assert all(listed[b, g, m] or m < 2 or m >= int(lengths[b]) // 16 - 3
               for b in range(2) for g in range(3) for m in ids[b, g].tolist())  # fmt: skip


def test_trace_on_the_copy_stream_is_followed_behind_its_scores():
    args = sample("quest", 5, torch.float32)
    trace = torch.zeros(2, 3, 1, 5, dtype=torch.bool)
    trace[..., 2] = True
    want = score("quest", *args, trace=trace)
    with use_engine(DeferredEngine()) as engine:
        late = score("quest", *args, stream=1, trace=trace)
        assert late.isnan().all()
        engine.record(0)
        engine.wait(0)
    assert torch.equal(late, want)
