"""What pages hold: both kinds give the same blocks, and the open one comes from the tail."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels.paged import (
    WRITTEN,
    Stored,
    block_pool,
    past_keys_values,
    read_blocks,
    read_pages,
    stored_or_none,
    tail_pages,
)
from sparda_compile.registry import KV_FORMATS

NAMES = ("int8", "fp8", "int4")
SIZE, DIM, GROUPS, BLOCKS = 16, 8, 2, 5
LENGTHS = torch.tensor([4 * SIZE + 3, 2 * SIZE], dtype=torch.int32)


class Pools:
    """Blocks of two sequences: some on pages, all that are full in CPU memory."""

    def __init__(self, name):
        found, generator = KV_FORMATS[name], torch.Generator().manual_seed(0)
        blocks = torch.randn(2, GROUPS, BLOCKS, 2, SIZE, DIM, generator=generator)
        self.host, self.blocks = found.pack(blocks), found.rounded(blocks)
        self.tail = torch.full((2, GROUPS, 2, 2, SIZE, DIM), float("nan"))
        self.tail[:, :, WRITTEN] = blocks[:, :, 4]
        self.blocks[0, :, 4] = blocks[0, :, 4]  # which is open
        self.table = torch.tensor([2, -1, 0, -1, 1], dtype=torch.int32).expand(2, GROUPS, BLOCKS)
        self.runs = self.host[:, :, [2, 0, 0]].clone()
        self.runs[:, :, 1] = 255  # the page that the open block has
        self.pages = self.blocks[:, :, [2, 4, 0]]


@pytest.mark.parametrize("name", NAMES)
def test_both_kinds_of_pages_give_the_same_blocks(name):
    pools = Pools(name)
    ids = torch.tensor([0, 2, 4], dtype=torch.int32).expand(2, GROUPS, 3)
    page_ids = pools.table.gather(-1, ids.long())
    want = read_pages(pools.pages, page_ids, ids, LENGTHS, None)
    got = read_pages(pools.runs, page_ids, ids, LENGTHS, Stored(pools.tail, name))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[0], pools.blocks[0][:, [0, 2, 4]])
    # The second sequence is at block 2: its page is not asked, and nothing is at 4.
    assert torch.equal(got[1, :, 0], want[1, :, 0])
    assert torch.equal(got[1, :, 1], pools.tail[1, :, WRITTEN])


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_an_index(name):
    pools = Pools(name)
    index = tuple(torch.tensor(part) for part in ([0, 1], [1, 0], [2, 0]))
    want = read_blocks(pools.pages, index, None)
    assert torch.equal(read_blocks(pools.runs, index, Stored(pools.tail, name)), want)
    assert torch.equal(want[1], pools.blocks[1, 0, 2])


@pytest.mark.parametrize("has_host", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_past_in_order(name, has_host):
    pools = Pools(name)
    table, host = pools.table, pools.host if has_host else torch.empty(0)
    given = (host, table, LENGTHS, name, ())
    want = past_keys_values(pools.pages, *given)
    got = past_keys_values(pools.runs, *given, pools.tail)
    known = (table[0, 0] >= 0).repeat_interleave(SIZE) if not has_host else slice(None)
    for mine, its in zip(got, want, strict=True):
        assert mine.shape == (2, GROUPS, BLOCKS * SIZE, DIM)
        assert torch.equal(mine[0][:, known], its[0][:, known])
        assert torch.equal(mine[1][:, :SIZE], its[1][:, :SIZE])


def test_what_ops_are_given():
    tail, table = torch.zeros(1, 1, 2, 2, SIZE, DIM), torch.full((1, 1, 3), 7)
    pages = torch.zeros(1, 1, 3, 40, dtype=torch.uint8)
    assert block_pool(pages, tail) is tail
    assert block_pool(pages, None) is pages
    assert stored_or_none(None, "int8") is None
    assert stored_or_none(tail, "int8") == Stored(tail, "int8")
    assert tail_pages(table, is_tail=False) is table
    assert (tail_pages(table, is_tail=True) == WRITTEN).all()
