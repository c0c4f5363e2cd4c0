from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparda_compile.kernels.sparse_attention import (
    attend_missing,
    attend_resident,
    blocks_per_split,
    sparse_attention,
)

SIZE = 16


class Case:
    """Pages in random order, selected blocks padded with -1, and NaN wherever nothing is."""

    def __init__(self, num_blocks, selected, *, repeat=1, dim=16, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.rows, self.groups, num_pages = 2, 2, num_blocks + 2
        shape = (self.rows, self.groups, num_pages, 2, SIZE, dim)
        self.pages = torch.full(shape, float("nan"), dtype=dtype)
        # Row 1 is shorter by a few tokens; both end in the last block.
        last = (num_blocks - 1) * SIZE
        self.lengths = torch.tensor([last + 15, last + 3], dtype=torch.int32)
        self.query = torch.randn(self.rows, self.groups * repeat, 1, dim, generator=generator).to(
            dtype
        )
        self.page_ids = torch.full((self.rows, self.groups, selected), -1, dtype=torch.int32)
        self.block_ids = self.page_ids.clone()
        for row in range(self.rows):
            for group in range(self.groups):
                others = torch.randperm(num_blocks - 1, generator=generator)[: selected - 1]
                ids = sorted([*others.tolist(), num_blocks - 1])
                page = torch.randperm(num_pages, generator=generator)[: len(ids)].int()
                self.block_ids[row, group, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
                self.page_ids[row, group, : len(ids)] = page
                for block, place in zip(ids, page.tolist(), strict=True):
                    seen = min(SIZE, int(self.lengths[row]) + 1 - block * SIZE)
                    kv = torch.randn(2, seen, dim, generator=generator).to(dtype)
                    self.pages[row, group, place, :, :seen] = kv

    def truth(self, scale, softcap):
        """Return softmax attention over the seen tokens, in fp64, one head at a time."""
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        repeat = self.query.shape[1] // self.groups
        for row in range(self.rows):
            for head in range(self.query.shape[1]):
                group = head // repeat
                pairs = zip(self.block_ids[row, group], self.page_ids[row, group], strict=True)
                kv = torch.cat(
                    [
                        self.pages[row, group, page, :, : int(self.lengths[row]) + 1 - block * SIZE]
                        for block, page in pairs
                        if block >= 0
                    ],
                    dim=1,
                ).double()
                scores = kv[0] @ self.query[row, head, 0].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                out[row, head, 0] = scores.softmax(0) @ kv[1]
        return out

    def attend(self, scale=0.25, softcap=0.0):
        selection = (self.page_ids, self.block_ids, self.lengths)
        return sparse_attention(self.query, self.pages, *selection, scale, softcap)

    def attend_in_parts(self, is_miss, scale=0.25, softcap=0.0):
        """Attend with the pages of missing blocks unwritten until the second part."""
        selection = (self.page_ids, self.block_ids, is_miss, self.lengths)
        early = self.pages.clone()
        for row, group, entry in is_miss.nonzero().tolist():
            page = self.page_ids[row, group, entry]
            if page >= 0:
                early[row, group, page] = float("nan")
        partial = attend_resident(self.query, early, *selection, scale, softcap)
        return attend_missing(self.query, self.pages, *selection, *partial, scale, softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_blocks", "selected", "repeat", "dim", "softcap"),
    [
        (1, 1, 1, 16, 0.0),
        (1, 7, 3, 60, 0.0),
        (37, 7, 7, 60, 0.0),
        (37, 37, 1, 16, 0.0),
        (37, 9, 3, 16, 2.0),
        (5, 3, 1, 128, 30.0),
    ],
)
def test_attention_equals_softmax_over_selected_tokens(
    assert_near, num_blocks, selected, repeat, dim, softcap, dtype
):
    case = Case(num_blocks, selected, repeat=repeat, dim=dim, dtype=dtype)
    got = case.attend(scale=0.4, softcap=softcap)
    assert got.dtype == dtype
    assert got.shape == case.query.shape
    assert_near(got, case.truth(0.4, softcap), dtype)


def test_strided_query_gives_the_same():
    case = Case(9, 4, repeat=3)
    want = case.attend()
    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(case.attend(), want)


@given(seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
def test_parts_equal_the_whole_bit_for_bit(seed, share):
    case = Case(11, 6, repeat=3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    is_miss = torch.rand(case.block_ids.shape, generator=generator) < share
    is_miss &= case.block_ids >= 0
    for softcap in (0.0, 5.0):
        got = case.attend_in_parts(is_miss, softcap=softcap)
        assert torch.isfinite(got).all()
        assert torch.equal(got, case.attend(softcap=softcap))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parts_equal_the_whole_in_half_precision(dtype):
    case = Case(11, 6, repeat=7, dim=60, dtype=dtype)
    is_miss = (torch.arange(6) % 2 == 0).expand_as(case.block_ids) & (case.block_ids >= 0)
    assert torch.equal(case.attend_in_parts(is_miss), case.attend())


def test_missing_blocks_have_empty_partials():
    selected = 24
    case = Case(40, selected)
    is_miss = case.block_ids % 16 == 1
    out, lse = attend_resident(
        case.query, case.pages, case.page_ids, case.block_ids, is_miss, case.lengths, 1.0, 0.0
    )
    assert out.dtype == lse.dtype == torch.float32
    assert is_miss.any()
    # One missing block makes the whole split wait.
    blocks = blocks_per_split(4, selected, SIZE)
    is_late = is_miss.unflatten(-1, (-1, blocks)).any(-1)
    assert is_late.any()
    assert not is_late.all()
    assert lse[is_late].eq(float("-inf")).all()
    assert out[is_late].eq(0).all()
    assert lse[~is_late].isfinite().all()


@pytest.mark.parametrize(
    ("pairs", "selected", "size", "blocks"),
    [
        # At least the tokens of a turn.
        (1, 1, 64, 2), (2, 96, 64, 2), (2, 384, 16, 8), (2, 48, 128, 1),
        # As many programs as there are multiprocessors: 128 of 132.
        (8, 96, 64, 6), (32, 96, 64, 24), (128, 96, 64, 96), (32, 384, 16, 96),
        # More would take no less of the memory's time, and longer to begin.
        (96, 96, 64, 96),
        # Three times as many, and twice: 192 would leave half of the second round idle.
        (192, 96, 64, 48), (256, 96, 64, 96),
        # An odd number of blocks would leave half of its last turn idle.
        (4, 96, 64, 4),
        (2, 2048, 64, 32),
    ],
)  # fmt: skip
def test_splits_fill_the_gpu(pairs, selected, size, blocks):
    assert blocks_per_split(pairs, selected, size) == blocks


@given(
    pairs=st.integers(1, 700), selected=st.integers(1, 3000), size=st.sampled_from([16, 64, 128])
)
def test_no_split_is_empty_or_needlessly_short(pairs, selected, size):
    blocks = blocks_per_split(pairs, selected, size)
    assert blocks * size >= 128
    assert blocks == 128 // size or blocks <= selected


def test_partials_without_a_block_are_empty():
    case = Case(3, 2)
    case.block_ids.fill_(-1)
    case.page_ids.fill_(-1)
    nobody = torch.zeros_like(case.block_ids, dtype=torch.bool)
    out, lse = attend_resident(
        case.query, case.pages, case.page_ids, case.block_ids, nobody, case.lengths, 1.0, 0.0
    )
    assert out.eq(0).all()
    assert lse.eq(float("-inf")).all()
