from __future__ import annotations

import pytest
import torch

from sparda_compile.isa.engines import DeferredEngine, use_engine
from sparda_compile.isa.streams import COPY
from sparda_compile.kernels.select_blocks import select_blocks
from sparda_compile.runtime.block_table import assign_pages, plan_pages, select_pages

SIZE = 16


class Tables:
    """Tables of one row and group, and the plans made with them."""

    def __init__(self, page_block, page_stamp=None, num_blocks=8):
        stamps = page_stamp or [0 if block >= 0 else -1 for block in page_block]
        self.page_block = torch.tensor([[page_block]], dtype=torch.int32)
        self.page_stamp = torch.tensor([[stamps]], dtype=torch.int32)
        self.block_table = torch.full((1, 1, num_blocks), -1, dtype=torch.int32)
        for page, block in enumerate(page_block):
            if block >= 0:
                self.block_table[0, 0, block] = page
        self.counters = torch.zeros(5, dtype=torch.int64)

    def plan(self, ids, length, *, eviction="lru", is_hint=False, stream=0):
        ids = torch.tensor([[ids]], dtype=torch.int32)
        lengths = torch.tensor([length], dtype=torch.int32)
        tables = (self.block_table, self.page_block, self.page_stamp, self.counters)
        return plan_pages(ids, lengths, *tables, SIZE, eviction, is_hint, stream)


def test_hits_stay_and_misses_take_the_oldest_pages():
    tables = Tables([5, 3, -1, 0], [4, 2, -1, 7])
    page_ids, is_miss, blocks, pages, tail = tables.plan([0, 1, 2, 6], 6 * SIZE + 3)
    # The free page and those stamped 2 and 4 are handed out by their numbers; 6 is being written.
    assert page_ids.tolist() == [[[3, 0, 1, 2]]]
    assert is_miss.tolist() == [[[False, True, True, False]]]
    assert blocks.tolist() == [[[1, 2, -1, -1]]]
    assert pages.tolist() == [[[0, 1, -1, -1]]]
    assert tail.tolist() == [[2]]
    assert tables.page_block.tolist() == [[[1, 2, 6, 0]]]
    assert tables.block_table.tolist() == [[[3, 0, 1, -1, -1, -1, 2, -1]]]
    assert tables.page_stamp.tolist() == [[[99, 99, 99, 99]]]
    assert tables.counters.tolist() == [2, 2, 0, 2, 0]


def test_fifo_does_not_renew_hits():
    tables = Tables([0, 1, 2], [3, 1, 2])
    tables.plan([1, 3, -1], 5 * SIZE, eviction="fifo")
    assert tables.page_block.tolist() == [[[0, 1, 3]]]
    assert tables.page_stamp.tolist() == [[[3, 1, 80]]]
    tables.plan([4, -1, -1], 5 * SIZE, eviction="fifo")
    assert tables.page_block.tolist() == [[[0, 4, 3]]]


def test_nothing_selected_changes_nothing():
    tables = Tables([0, 1, -1])
    before = [t.clone() for t in (tables.block_table, tables.page_block, tables.page_stamp)]
    results = tables.plan([-1, -1], 40)
    assert [r.flatten().tolist() for r in results] == [[-1, -1], [0, 0], [-1, -1], [-1, -1], [-1]]
    after = (tables.block_table, tables.page_block, tables.page_stamp)
    assert all(map(torch.equal, before, after))
    assert not tables.counters.any()


def test_hints_count_as_prefetches_only():
    tables = Tables([0, 1, -1])
    tables.plan([0, 2], 60, is_hint=True)
    assert tables.counters.tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("eviction", ["lru", "fifo"])
def test_hint_does_not_push_out_the_block_being_written(eviction):
    """Its tokens are nowhere else; a hint that is older than the block does not name it."""
    tables = Tables([4, 0, 1, 2], [0, 5, 5, 5])
    tables.plan([0, 1, 3], 4 * SIZE + 2, eviction=eviction, is_hint=True)
    assert tables.page_block.tolist() == [[[4, 0, 1, 3]]]


def test_assigning_without_a_written_block_may_take_any_page():
    tables = Tables([4, 0], [0, 5])
    ids = torch.tensor([[[1, -1]]], dtype=torch.int32)
    stamp = torch.tensor([9], dtype=torch.int32)
    page, absent = assign_pages(
        ids, stamp, tables.block_table, tables.page_block, tables.page_stamp, "lru"
    )
    assert page.tolist() == [[[0, -1]]]
    assert absent.tolist() == [[[True, False]]]
    assert tables.page_stamp.tolist() == [[[9, 5]]]


def test_rows_and_groups_are_planned_apart():
    page_block = torch.tensor([[[0, 1, 2], [3, -1, -1]]] * 2, dtype=torch.int32)
    table = torch.tensor([[[0, 1, 2, -1], [-1, -1, -1, 0]]] * 2, dtype=torch.int32)
    stamp = torch.where(page_block >= 0, 0, -1).int()
    ids = torch.tensor([[[2, -1], [1, 3]], [[0, 3], [-1, -1]]], dtype=torch.int32)
    lengths = torch.tensor([50, 63], dtype=torch.int32)
    counters = torch.zeros(5, dtype=torch.int64)
    page_ids, is_miss, *_, tail = plan_pages(
        ids, lengths, table, page_block, stamp, counters, SIZE, "lru", False
    )
    assert page_ids.tolist() == [[[2, -1], [1, 0]], [[0, 1], [-1, -1]]]
    assert is_miss.tolist() == [[[False] * 2, [True, False]], [[False] * 2, [False] * 2]]
    assert tail.tolist() == [[-1, 0], [1, -1]]
    assert page_block.tolist() == [[[0, 1, 2], [3, 1, -1]], [[0, 3, 2], [3, -1, -1]]]


def test_plan_on_the_copy_stream_waits_for_its_turn():
    tables = Tables([0, -1])
    with use_engine(DeferredEngine()) as engine:
        page_ids, *_ = tables.plan([0, 1], 20, stream=COPY)
        assert tables.block_table[0, 0, 1] == -1
        engine.record(3)
        engine.wait(3)
    assert page_ids.tolist() == [[[0, 1]]]


class Steps:
    """Tables of a batch, and the random scores of one step after another."""

    ROWS, GROUPS, BLOCKS, PAGES = 3, 2, 12, 8

    def __init__(self, lengths):
        shape = (self.ROWS, self.GROUPS)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.tables = [
            torch.full((*shape, size), -1, dtype=torch.int32)
            for size in (self.BLOCKS, self.PAGES, self.PAGES)
        ]
        self.tables.append(torch.zeros(5, dtype=torch.int64))
        self.generator = torch.Generator().manual_seed(0)

    def scores(self):
        """Return [B, G, N]; some blocks have none, and many are equal."""
        shape = (self.ROWS, self.GROUPS, self.BLOCKS)
        scores = torch.randint(0, 4, shape, generator=self.generator).float()
        return scores.masked_fill(scores == 0, float("-inf"))


@pytest.mark.parametrize("is_hint", [False, True])
@pytest.mark.parametrize("eviction", ["lru", "fifo"])
def test_fused_op_equals_selecting_and_then_planning(eviction, is_hint):
    fused, apart = (Steps([100, 7, 190]) for _ in range(2))
    sizes = (6, SIZE, 1, 2)
    fetched = 0
    for _ in range(30):
        got = select_pages(fused.scores(), fused.lengths, *fused.tables, *sizes, eviction, is_hint)
        ids = select_blocks(apart.scores(), apart.lengths, *sizes)
        want = (ids, *plan_pages(ids, apart.lengths, *apart.tables, SIZE, eviction, is_hint))
        assert len(got) == len(want) == 6
        for one, other in zip((*got, *fused.tables), (*want, *apart.tables), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        fetched += int(want[2].sum())
        for steps in (fused, apart):
            steps.lengths = (steps.lengths + 1).clamp(max=SIZE * Steps.BLOCKS - 1)
    assert fetched > 30


def test_fused_op_on_the_copy_stream_waits_for_its_turn():
    steps = Steps([100, 7, 190])
    with use_engine(DeferredEngine()) as engine:
        ids, *_ = select_pages(
            steps.scores(), steps.lengths, *steps.tables, 6, SIZE, 1, 2, "lru", False, COPY
        )
        assert steps.tables[0].eq(-1).all()
        engine.record(3)
        engine.wait(3)
    assert ids[1].tolist() == [[0, -1, -1, -1, -1, -1]] * 2
    assert steps.tables[0][1, :, 0].ge(0).all()
