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
        (
            torch.randn(2, 3, *shape, generator=generator)
            * (30000 if name in summary.dtypes else 1)
        ).to(summary.dtypes.get(name, dtype))
        for name, shape in summary.shapes(geometry, dim).items()
    ]
    repeat = 1 if selector.endswith("forecast") else 7
    query = torch.randn(2, 3 * repeat, 1, dim, generator=generator).to(dtype)
    newest = num_blocks * 16 - (num_blocks > 1)  # one block alone is full: some score full ones
    lengths = torch.tensor([newest, num_blocks * 8], dtype=torch.int32)
    return query, tensors, lengths, geometry


def score(selector, query, tensors, lengths, geometry, *, stream=0):
    sizes = (geometry.num_blocks, geometry.block_size, geometry.pool_size, geometry.pool_stride)
    return score_blocks(query, tensors, lengths, selector, 0.2, *sizes, stream)


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
    # What low-bit keys stand for is rounded to the dtype of the keys, by definition.
    precision = dtype if selector.startswith("lowbit") else torch.float32
    assert_near(got[exists], want[exists].double(), precision)


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


@pytest.mark.parametrize("selector", ["nosa", "nosa_forecast"])
def test_short_list_is_above_the_rest(selector):
    query, tensors, lengths, geometry = sample(selector, 37, torch.float32)
    sizes = (geometry.num_blocks, geometry.block_size, geometry.pool_size, geometry.pool_stride)
    chosen = {"short_list": 5, "sink_blocks": 2, "local_blocks": 3}
    got, kept = (
        score_blocks(query, tensors, lengths, selector, 0.2, *sizes, **more)
        for more in (chosen, {})
    )
    listed = got != kept
    assert listed.sum(-1).eq(5).all()
    for row, length in enumerate(lengths.tolist()):
        assert not listed[row, :, :2].any()
        assert not listed[row, :, length // 16 - 3 :].any()
    assert got[listed].isfinite().all()
    assert got[listed].min() > kept[kept.isfinite()].max()
    ids = select_blocks(got, lengths, 2 + 3 + 1 + 5, 16, 2, 3)
    assert all(listed[b, g, m] or m < 2 or m >= int(lengths[b]) // 16 - 3
               for b in range(2) for g in range(3) for m in ids[b, g].tolist())  # fmt: skip
