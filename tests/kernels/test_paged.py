"""What pages hold: both kinds give the same blocks, and the open one comes from the tail."""

from __future__ import annotations

import pytest
import torch
from stored_pools import DIM, GROUPS, LENGTHS, SIZE, Pools

from sparda_compile.kernels.paged import (
    WRITTEN,
    Stored,
    block_pool,
    num_new_slots,
    read_blocks,
    read_pages,
    stored_or_none,
    tail_pages,
)

NAMES = ("int8", "fp8", "int4")


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


def test_what_ops_are_given():
    tail, table = torch.zeros(1, 1, 2, 2, SIZE, DIM), torch.full((1, 1, 3), 7)
    pages = torch.zeros(1, 1, 3, 40, dtype=torch.uint8)
    assert block_pool(pages, tail) is tail
    assert block_pool(pages, None) is pages
    assert stored_or_none(None, "int8") is None
    assert stored_or_none(tail, "int8") == Stored(tail, "int8")
    assert tail_pages(table, is_tail=False) is table
    assert (tail_pages(table, is_tail=True) == WRITTEN).all()


def test_new_tokens_may_begin_in_a_block_and_end_in_another():
    assert [num_new_slots(tokens, 16) for tokens in (1, 16, 17, 33)] == [2, 2, 3, 4]
