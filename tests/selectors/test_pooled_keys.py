from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparda_compile.selectors.base import Geometry
from sparda_compile.selectors.pooled_keys import (
    PooledKeys,
    existing_windows,
    windows_to_blocks,
)

GEOMETRIES = [
    Geometry(6, 16, 8, 4),
    Geometry(6, 16, 16, 16),
    Geometry(4, 16, 32, 16),
    Geometry(3, 64, 32, 16),
    Geometry(2, 16, 4, 2),
]


def empty(geometry, rows=1, groups=2, dim=3):
    shapes = PooledKeys().shapes(geometry, dim)
    tensors = [torch.full((rows, groups, *shape), float("nan")) for shape in shapes.values()]
    PooledKeys().reset(tensors)
    return tensors


def whole_keys(generator, *shape):
    """Whole numbers: a mean of them is exact in any order of addition."""
    return torch.randint(-64, 64, shape, generator=generator).float()


def check(pooled_GWD, k_GSD, geometry):
    size, stride = geometry.pool_size, geometry.pool_stride
    num_windows = 0
    for j in range(geometry.num_windows):
        if j * stride + size <= k_GSD.shape[1]:
            window = k_GSD[:, j * stride : j * stride + size]
            assert torch.equal(pooled_GWD[:, j], window.mean(1))
            num_windows += 1
    assert (
        existing_windows(torch.tensor([k_GSD.shape[1]]), geometry.num_windows, geometry).sum()
        == num_windows
    )


@given(
    geometry=st.sampled_from(GEOMETRIES),
    chunks=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_any_chunks_give_the_windows_of_all_keys(geometry, chunks, seed):
    """A chunk of 0 is one token in the decode form; others come with padding."""
    generator = torch.Generator().manual_seed(seed)
    tensors, seen = empty(geometry), torch.zeros(2, 0, 3)
    for chunk in chunks:
        num_tokens = min(chunk or 1, geometry.num_blocks * geometry.block_size - seen.shape[1])
        if not num_tokens:
            break
        length = torch.tensor([seen.shape[1]], dtype=torch.int32)
        k_BGTD = whole_keys(generator, 1, 2, num_tokens, 3)
        mask = None if chunk == 0 else torch.rand(1, num_tokens, generator=generator) < 0.8
        PooledKeys().extend(tensors, k_BGTD, length, mask, geometry)
        new = k_BGTD[0] if mask is None else k_BGTD[0][:, mask[0]]
        seen = torch.cat([seen, new], dim=1)
        check(tensors[0][0], seen, geometry)


def test_rows_of_a_batch_keep_their_own_lengths():
    geometry = Geometry(6, 16, 8, 4)
    generator = torch.Generator().manual_seed(0)
    tensors = empty(geometry, rows=3)
    seen = [torch.zeros(2, 0, 3) for _ in range(3)]
    for step in range(40):
        width = 21 if step == 0 else 1
        k_BGTD = whole_keys(generator, 3, 2, width, 3)
        starts = [0, 9, 20] if step == 0 else [0, 0, 0]
        mask = torch.arange(width) >= torch.tensor(starts)[:, None]
        lengths = torch.tensor([k.shape[1] for k in seen], dtype=torch.int32)
        PooledKeys().extend(tensors, k_BGTD, lengths, mask if step == 0 else None, geometry)
        seen = [torch.cat([k, k_BGTD[i][:, mask[i]]], dim=1) for i, k in enumerate(seen)]
    for row, keys in enumerate(seen):
        check(tensors[0][row], keys, geometry)


def test_means_are_taken_in_fp32():
    """Sums of eight large keys overflow fp16, their mean does not."""
    geometry = Geometry(1, 16, 8, 4)
    tensors = [t.half() for t in empty(geometry)]
    k_BGTD = torch.full((1, 2, 8, 3), 40000.0).half()
    PooledKeys().extend(
        tensors, k_BGTD, torch.zeros(1, dtype=torch.int32), torch.ones(1, 8).bool(), geometry
    )
    assert torch.equal(tensors[0][0, :, 0], k_BGTD[0, :, 0])
    for position in range(8, 12):
        PooledKeys().extend(tensors, k_BGTD[:, :, :1], torch.tensor([position]), None, geometry)
    assert torch.equal(tensors[0][0, :, 1], k_BGTD[0, :, 0])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_block_takes_the_best_of_the_windows_that_touch_it(geometry):
    scores = torch.randn(2, 2, geometry.num_windows, generator=torch.Generator().manual_seed(1))
    scores[0, 0, 0] = float("-inf")
    blocks = windows_to_blocks(scores, geometry)
    for m in range(geometry.num_blocks):
        touching = [
            j
            for j in range(geometry.num_windows)
            if j * geometry.pool_stride < (m + 1) * geometry.block_size
            and j * geometry.pool_stride + geometry.pool_size > m * geometry.block_size
        ]
        assert torch.equal(blocks[..., m], scores[..., touching].amax(-1))


def test_published_geometry_pools_five_windows():
    geometry = Geometry(8, 64, 32, 16)
    for m in range(8):
        touching = [
            j for j in range(geometry.num_windows)
            if windows_to_blocks(
                torch.arange(geometry.num_windows).eq(j).float()[None, None], geometry
            )[0, 0, m]
        ]  # fmt: skip
        assert touching == [j for j in range(4 * m - 1, 4 * m + 4) if 0 <= j < 31]
