"""Kernels that make, merge and remove partials, against the references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_compile.kernels.gpu import partials as room
from sparda_compile.kernels.partials import block_partials, merge, remove

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN, INF = float("nan"), float("inf")


def attend(device, query, pages, page_ids, block_ids, lengths, softcap=0.0):
    """Return what the kernel makes, on the CPU."""
    args = [t.to(device) for t in (query, pages, page_ids, block_ids, lengths)]
    shape = (*block_ids.shape, query.shape[1] // pages.shape[1])
    out = torch.full((*shape, query.shape[-1]), NAN, device=device)
    results = (out, torch.full(shape, NAN, device=device))
    room.attend_blocks(*args, 0.3, softcap, results, early=False)
    return [t.cpu() for t in results]


def blocks(repeat=3, size=16, dim=24, dtype=torch.float32, num_blocks=5, seed=0):
    """Return operands: three sequences, the last of one token; NaN where no token is."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randn(3, 1, num_blocks + 1, 2, size, dim, generator=generator).to(dtype)
    query = torch.randn(3, repeat, 1, dim, generator=generator).to(dtype)
    lengths = torch.tensor([num_blocks * size - 1, 2 * size + 3, 0], dtype=torch.int32)
    block_ids = torch.arange(num_blocks, dtype=torch.int32).expand(3, 1, -1)
    page_ids = torch.full((3, 1, num_blocks), -1, dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        order = torch.randperm(num_blocks + 1, generator=generator)
        known = length // size + 1
        page_ids[row, 0, :known] = order[:known].int()
        pages[row, 0, order[known:]] = NAN
        pages[row, 0, order[known - 1], :, length % size + 1 :] = NAN
    return query, pages, page_ids, block_ids.masked_fill(page_ids < 0, -1), lengths


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("repeat", "size", "dim", "softcap"), [(3, 16, 24, 0.0), (1, 48, 64, 2.0)])
def test_blocks_equal_the_reference(device, assert_close, repeat, size, dim, softcap, dtype):
    operands = blocks(repeat, size, dim, dtype)
    got = attend(device, *operands, softcap)
    query, pages, *others = operands
    want = block_partials(query.float(), pages.float(), *others, 0.3, softcap)
    for mine, its in zip(got, want, strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, its, "attention", dtype)
    nothing = operands[3] < 0
    assert nothing.any()
    assert got[0][nothing].eq(0).all()


def test_a_block_has_the_same_bits_in_any_company(device, monkeypatch):
    query, pages, page_ids, block_ids, lengths = blocks(num_blocks=7)
    out, lse = attend(device, query, pages, page_ids, block_ids, lengths)
    for programs in (1, 4):
        monkeypatch.setattr(room, "_PROGRAMS_AT_ONCE", programs)
        for kept in ([2], [4, 0, 1], list(range(7))):
            ids = page_ids[..., kept].contiguous(), block_ids[..., kept].contiguous()
            some_out, some_lse = attend(device, query, pages, *ids, lengths)
            assert torch.equal(some_out, out[:, :, kept])
            assert torch.equal(some_lse, lse[:, :, kept])


def merged(device, out, lse, keep=None):
    shape = (*lse.shape[:-2], *out.shape[-2:])
    results = torch.full(shape, NAN, device=device), torch.full(shape[:-1], NAN, device=device)
    keep = None if keep is None else keep.to(device)
    room.merge(out.to(device), lse.to(device), keep, results)
    return [t.cpu() for t in results]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=6)
@given(
    seed=st.integers(0, 1000), num_partials=st.sampled_from([1, 5, 70]),
    dim=st.sampled_from([8, 20, 96]), share=st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_merges_equal_the_reference(device, seed, num_partials, dim, share):
    """NaN in what does not count, and in the output of a partial of nothing."""
    out = randn(2, 1, num_partials, 3, dim, seed=seed)
    lse = 5 * randn(2, 1, num_partials, 3, seed=seed + 1) + 30
    lse[:, :, ::4] = -INF
    out[:, :, ::4] = NAN
    keep = torch.rand(2, 1, num_partials, generator=torch.Generator().manual_seed(seed)) < share
    out[~keep], lse[~keep] = NAN, NAN
    want = merge(out, lse, keep)
    got = merged(device, out, lse, keep)
    # As of an order of its own: (S + 8) units of the largest partial.
    assert (got[0] - want[0]).abs().max() <= 2 * (num_partials + 8) * 2.0**-23 * 5
    assert torch.equal(got[1] > -INF, want[1] > -INF)
    known = want[1] > -INF
    assert torch.allclose(got[1][known], want[1][known], rtol=1e-6, atol=1e-6)


def test_merges_of_many_tiles_of_few_and_of_none(device, monkeypatch):
    out, lse = randn(2, 37, 2, 40), randn(2, 37, 2)
    want = merge(out, lse)
    for tile in (32, 512, 4096):
        monkeypatch.setattr(room, "_MERGE_TILE", tile)
        assert torch.allclose(merged(device, out, lse)[0], want[0], atol=1e-6)
    for got in merged(device, out[:, :0], lse[:, :0]), merged(device, out[:0], lse[:0]):
        assert got[0].eq(0).all()
        assert got[1].eq(-INF).all()


@pytest.mark.parametrize("dim", [8, 20, 128])
def test_removals_equal_the_reference(device, monkeypatch, dim):
    """What weighs nothing, next to all, and as much as is refused; and rows that are no tile."""
    monkeypatch.setattr(room, "_MERGE_TILE", 8 * 128)
    out, lse = randn(3, 2, 7, dim), randn(3, 2, 7)
    lse[1] += 4.0
    lse[2, 1] = -INF
    whole = merge(out, lse)
    part = (out[:, 0], lse[:, 0])
    part[1][:, :2], part[0][:, 0], part[1][0, 3] = -INF, NAN, 50.0
    whole[1][1, 6] = -INF
    part[0][0, 4], part[1][0, 4] = whole[0][0, 4], whole[1][0, 4]
    for limit in (1.0 - 1e-9, 0.5, 0.01, 0.0):
        want = remove(*whole, *part, limit)
        shape = want[0].shape
        got = [torch.full(shape, NAN, device=device), torch.full(shape[:-1], NAN, device=device)]
        got.append(torch.zeros(shape[:-1], dtype=torch.bool, device=device))
        sides = [tuple(t.to(device) for t in side) for side in (whole, part)]
        room.remove(*sides, limit, tuple(got))
        got = [t.cpu() for t in got]
        assert torch.equal(got[2], want[2])
        assert want[2].any()
        assert not want[2].all()
        assert torch.allclose(got[0], want[0], atol=1e-5)
        known = want[1] > -INF
        assert torch.equal(got[1] > -INF, known)
        assert torch.allclose(got[1][known], want[1][known], atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("repeat", "size", "dim"), [(16, 64, 128), (4, 128, 256), (1, 16, 64)])
def test_large_shapes(device, assert_close, repeat, size, dim, dtype):
    operands = blocks(repeat, size, dim, dtype, num_blocks=200)
    got = attend(device, *operands)
    query, pages, *others = operands
    want = block_partials(query.float(), pages.float(), *others, 0.3)
    for mine, its in zip(got, want, strict=True):
        assert_close(mine, its, "attention", dtype)
    assert torch.allclose(merged(device, *want)[0], merge(*want)[0], atol=1e-4)
