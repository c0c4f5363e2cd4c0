from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_compile.kernels.gpu.attention import attend, merge, partials
from sparda_compile.kernels.sparse_attention import sparse_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


class Case:
    """Selected blocks in pages of any order, padded with -1; NaN wherever no token is."""

    def __init__(self, device, lengths, selected, sizes, dtype=torch.float32, seed=0):
        self.device, self.dtype = device, dtype
        groups, repeat, size, dim = sizes
        generator = torch.Generator().manual_seed(seed)
        batch, num_pages = len(lengths), selected + 2
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.pages = torch.full((batch, groups, num_pages, 2, size, dim), NAN, dtype=dtype)
        self.block_ids = torch.full((batch, groups, selected), -1, dtype=torch.int32)
        self.page_ids = self.block_ids.clone()
        query = torch.randn(batch, 1, groups * repeat, dim, generator=generator)
        self.query = query.to(dtype).transpose(1, 2)
        for row, length in enumerate(lengths):
            current = length // size
            for group in range(groups):
                others = torch.randperm(current, generator=generator)[: selected - 1]
                ids = torch.cat([others.sort().values, torch.tensor([current])])
                page = torch.randperm(num_pages, generator=generator)[: len(ids)]
                self.block_ids[row, group, : len(ids)] = ids.int()
                self.page_ids[row, group, : len(ids)] = page.int()
                kv = torch.randn(len(ids), 2, size, dim, generator=generator)
                kv[-1, :, length % size + 1 :] = NAN
                self.pages[row, group, page] = kv.to(dtype)

    def operands(self, pages=None):
        pages = self.pages if pages is None else pages
        tensors = (self.query, pages, self.page_ids, self.block_ids, self.lengths)
        return [t.to(self.device) for t in tensors]

    def partials(self, scale, softcap, per_split, is_miss=None, *, missing=False, pages=None):
        *tensors, lengths = self.operands(pages)
        flags = None if is_miss is None else is_miss.to(self.device)
        return partials(*tensors, flags, lengths, scale, softcap, per_split, missing=missing)

    def attend(self, scale=0.2, softcap=0.0, per_split=1):
        return attend(*self.operands(), scale, softcap, per_split)

    def want(self, scale=0.2, softcap=0.0):
        """Return what the reference makes of the same values in fp32."""
        args = (self.page_ids, self.block_ids, self.lengths, scale, softcap)
        return sparse_attention(self.query.float(), self.pages.float(), *args)

    def attend_in_parts(self, is_miss, softcap=0.0, per_split=1):
        """Attend with NaN in the pages of missing blocks until the second part."""
        early = self.pages.clone()
        row, group, entry = torch.where(is_miss)
        early[row, group, self.page_ids[row, group, entry].long()] = NAN
        first = self.partials(0.2, softcap, per_split, is_miss, pages=early)
        late = self.partials(0.2, softcap, per_split, is_miss, missing=True)
        return merge(*first, late, self.dtype), first, late


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("per_split", [1, 2, 4])
def test_kernels_equal_the_reference(device, assert_close, per_split, softcap, dtype):
    case = Case(device, [16 * 4 + 3, 16 * 9 + 15], 6, (2, 3, 16, 24), dtype)
    got = case.attend(0.3, softcap, per_split)
    assert got.dtype == dtype
    assert_close(got, case.want(0.3, softcap), "attention", dtype)


@pytest.mark.parametrize("repeat", [1, 3, 7, 16, 17])
def test_groups_of_every_size(device, assert_close, repeat):
    case = Case(device, [70], 4, (2, repeat, 16, 16))
    assert_close(case.attend(), case.want(), "attention", torch.float32)


@pytest.mark.parametrize(
    ("size", "dim", "per_split"),
    # Tiles of parts of a block, of one and of many, splits of parts of a tile and of many.
    [(16, 8, 2), (16, 16, 7), (16, 16, 20), (32, 60, 2), (64, 96, 5), (128, 256, 2), (48, 16, 3)],
)
def test_head_dims_and_block_sizes(device, assert_close, size, dim, per_split):
    case = Case(device, [size * 21 + 1, size * 3 - 1], 21, (1, 3, size, dim))
    assert_close(case.attend(per_split=per_split), case.want(), "attention", torch.float32)
    is_miss = (torch.arange(21) % 9 == 0) & (case.block_ids >= 0)
    check_parts(case, is_miss, 0.0, per_split)


@pytest.mark.parametrize(("selected", "per_split"), [(1, 1), (1, 16), (5, 4), (5, 16)])
def test_ends_of_sequences_and_fewer_blocks_than_wanted(device, assert_close, selected, per_split):
    """One token, two, a full block, one token of a new block; K=1, and splits with no block."""
    case = Case(device, [0, 1, 15, 16, 63], selected, (1, 2, 16, 16))
    got = case.attend(per_split=per_split)
    assert_close(got, case.want(), "attention", torch.float32)
    if selected == 1:
        first = case.page_ids[0, 0, 0]
        value = case.pages[0, 0, first, 1, 0]
        assert torch.equal(got[0].cpu(), value.expand(2, 1, 16))


def test_partials_equal_the_definition(device, assert_close):
    case = Case(device, [16 * 6 + 2, 20], 5, (2, 3, 16, 20))
    out, lse = (t.cpu() for t in case.partials(0.3, 2.0, 2))
    assert out.shape == (2, 2, 3, 3, 20)
    assert out.dtype == lse.dtype == torch.float32
    for row in range(2):
        for group in range(2):
            for split in range(3):
                ids = case.block_ids[row, group, 2 * split : 2 * split + 2].tolist()
                pages = case.page_ids[row, group, 2 * split : 2 * split + 2].tolist()
                kept = [
                    case.pages[row, group, page, :, : int(case.lengths[row]) + 1 - block * 16]
                    for block, page in zip(ids, pages, strict=True)
                    if block >= 0
                ]
                if not kept:
                    assert out[row, group, split].eq(0).all()
                    assert lse[row, group, split].eq(float("-inf")).all()
                    continue
                keys, values = torch.cat(kept, dim=1).double()
                query = case.query[row, 3 * group : 3 * group + 3, 0].double()
                scores = 2.0 * torch.tanh(query @ keys.T * 0.3 / 2.0)
                want = scores.softmax(-1) @ values
                assert_close(out[row, group, split], want, "attention", torch.float32)
                want = scores.logsumexp(-1)
                assert_close(lse[row, group, split][None], want[None], "attention", torch.float32)


def test_extreme_scores_do_not_overflow(device, assert_close):
    """The weight is nearly all one token's; capped scores saturate at both ends."""
    case = Case(device, [100], 5, (1, 3, 16, 16))
    for scale, softcap in ((30.0, 0.0), (30.0, 50.0), (1000.0, 5.0)):
        got = case.attend(scale, softcap, 2).cpu().double()
        exact = Case(device, [100], 5, (1, 3, 16, 16), torch.float64)
        assert torch.equal(exact.pages.nan_to_num(), case.pages.double().nan_to_num())
        # Scores of a hundred are known to a few millionths in fp32.
        assert (got - exact_attention(exact, scale, softcap)).abs().max() < 1e-3


def exact_attention(case, scale, softcap):
    """Return fp64 attention of a case with one sequence and group."""
    tokens = [
        case.pages[0, 0, page, :, : int(case.lengths[0]) + 1 - block * case.pages.shape[4]]
        for page, block in zip(case.page_ids[0, 0], case.block_ids[0, 0], strict=True)
    ]
    keys, values = torch.cat(tokens, dim=1).double()
    scores = case.query[0, :, 0].double() @ keys.T * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.softmax(-1) @ values)[None, :, None]


def check_parts(case, is_miss, softcap, per_split):
    whole = case.attend(softcap=softcap, per_split=per_split)
    got, first, late = case.attend_in_parts(is_miss, softcap, per_split)
    assert got.isfinite().all()
    assert torch.equal(got, whole)
    padded = torch.nn.functional.pad(is_miss, (0, -is_miss.shape[-1] % per_split))
    waits = padded.unflatten(-1, (-1, per_split)).any(-1)
    for (out, lse), absent in ((first, waits), (late, ~waits)):
        assert out.cpu()[absent].eq(0).all()
        assert lse.cpu()[absent].eq(float("-inf")).all()


@settings(max_examples=6)
@given(
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.2, 0.5, 0.8]),
    softcap=st.sampled_from([0.0, 4.0]),
    per_split=st.sampled_from([1, 2, 4]),
)
def test_parts_equal_the_whole_bit_for_bit(device, seed, share, softcap, per_split):
    case = Case(device, [16 * 9 + 4, 16 * 3], 5, (1, 3, 16, 16), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    is_miss = torch.rand(case.block_ids.shape, generator=generator) < share
    check_parts(case, is_miss & (case.block_ids >= 0), softcap, per_split)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("misses", ["none", "all", "odd"])
def test_none_all_or_some_missing(device, misses, dtype):
    case = Case(device, [16 * 8 + 4, 30], 5, (1, 2, 16, 24), dtype)
    is_miss = (case.block_ids >= 0) & (misses != "none")
    if misses == "odd":
        is_miss &= case.block_ids % 2 == 1
        assert is_miss.any()
    check_parts(case, is_miss, 0.0, 2)


def test_merge_of_many_splits(device, assert_close):
    """More splits than one tile, some of them empty, and every result on its own side."""
    splits, dim = 70, 96
    out = torch.randn(1, 2, splits, 3, dim)
    lse = 5 * torch.randn(1, 2, splits, 3)
    lse[:, :, ::5] = float("-inf")
    out[:, :, ::5] = 0
    weight = lse.double().softmax(2)
    want = (weight[..., None] * out).sum(2).flatten(1, 2)[:, :, None]
    out, lse = out.to(device), lse.to(device)
    got = merge(out, lse, None, torch.float32)
    assert_close(got, want, "attention", torch.float32)
    is_late = torch.rand(splits, device=device) < 0.4
    sides = [
        (out.masked_fill(away[:, None, None], 0.0), lse.masked_fill(away[:, None], float("-inf")))
        for away in (is_late, ~is_late)
    ]
    assert torch.equal(merge(*sides[0], sides[1], torch.float32), got)
    assert torch.equal(merge(*sides[1], sides[0], torch.float32), got)


# Groups of every size with every size of block, head and split.
LARGE = [
    (repeat, size, dim, dtype, per_split, softcap)
    for dtype in DTYPES
    for (repeat, size, dim), per_split, softcap in zip(
        [
            (1, 16, 64), (3, 32, 64), (7, 64, 64), (8, 128, 64), (16, 16, 96), (1, 32, 96),
            (3, 64, 96), (7, 128, 96), (8, 16, 128), (16, 32, 128), (8, 64, 128), (16, 128, 128),
            (7, 16, 256), (8, 32, 256), (16, 64, 256), (3, 128, 256),
            (71, 64, 64), (48, 16, 128), (64, 32, 256), (24, 64, 128),
        ],
        [1, 2, 4, 16] * 4 + [96] * 4,
        [0.0, 0.0, 30.0] * 7,
        strict=False,
    )
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("repeat", "size", "dim", "dtype", "per_split", "softcap"), LARGE)
def test_large_shapes(device, assert_close, repeat, size, dim, dtype, per_split, softcap):
    """The reference's 96 blocks; sequences as long as 2048 blocks and as short as one token."""
    lengths = [2048 * size - 1, 300 * size + 5, 0, 1, 90 * size]
    case = Case(device, lengths, 96, (2, repeat, size, dim), dtype)
    got = case.attend(0.1, softcap, per_split)
    assert_close(got, case.want(0.1, softcap), "attention", dtype)
    is_miss = (torch.rand(case.block_ids.shape) < 0.1) & (case.block_ids >= 0)
    check_parts(case, is_miss, softcap, per_split)


@pytest.mark.gpu
def test_addresses_do_not_overflow(assert_close):
    case = Case("cuda", [150, 130], 2, (1, 4, 128, 256), torch.bfloat16)
    want = case.want()
    few, num_pages = case.pages, 33000
    pages = torch.full((2, 1, num_pages, *few.shape[3:]), NAN, dtype=few.dtype, device="cuda")
    assert pages[0].numel() > 2**31
    pages[:, :, -few.shape[2] :] = few.to("cuda")
    case.pages, case.page_ids = pages, case.page_ids + num_pages - few.shape[2]
    assert_close(case.attend(), want, "attention", torch.bfloat16)
