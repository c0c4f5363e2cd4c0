from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.runtime.append import (
    advance_lengths,
    append_kv,
    extend_kv,
    recall_ids,
    remember_ids,
    update_summary,
)

SIZE = 16


def empty(rows, groups, num_blocks, num_pages, dim=3):
    pages = torch.full((rows, groups, num_pages, 2, SIZE, dim), float("nan"))
    table = torch.full((rows, groups, num_blocks), -1, dtype=torch.int32)
    page_block = torch.full((rows, groups, num_pages), -1, dtype=torch.int32)
    return pages, table, page_block, page_block.clone()


def extend(state, k, v, mask, lengths, sink=1, local=1):
    lengths = torch.tensor(lengths, dtype=torch.int32)
    extend_kv(k, v, None, number_tokens(mask, lengths), lengths, *state, sink, local, "lru")


def test_append_writes_one_slot_per_row_and_group():
    pages = torch.zeros(2, 2, 3, 2, SIZE, 3)
    k, v = torch.randn(2, 2, 2, 1, 3)
    tail = torch.tensor([[2, 0], [1, 1]], dtype=torch.int32)
    append_kv(k, v, tail, torch.tensor([33, 15], dtype=torch.int32), pages)
    for row, offset in ((0, 1), (1, 15)):
        for group in range(2):
            page = tail[row, group]
            assert torch.equal(pages[row, group, page, 0, offset], k[row, group, 0])
            assert torch.equal(pages[row, group, page, 1, offset], v[row, group, 0])
    assert pages.count_nonzero() == 2 * 2 * 2 * 3


@pytest.mark.parametrize(
    ("length", "num_tokens", "resident"),
    [
        (0, 3, {0}),
        (0, 100, {0, 5, 6}),
        (0, 16, {0}),
        (0, 33, {0, 1, 2}),
        (20, 1, {1}),
        (20, 60, {1, 3, 4}),
        (32, 64, {2, 4, 5}),
    ],
)
def test_extend_keeps_first_and_last_blocks(length, num_tokens, resident):
    """Sink and local blocks, and the first: its older tokens are in its page only."""
    state = empty(1, 2, 8, 4)
    pages, table, page_block, page_stamp = state
    if length % SIZE:
        table[..., length // SIZE], page_block[..., 3] = 3, length // SIZE
        pages[:, :, 3] = 7.0
    k, v = torch.randn(2, 1, 2, num_tokens, 3)
    extend(state, k, v, torch.ones(1, num_tokens).bool(), [length])
    for group in range(2):
        assert {m for m in range(8) if table[0, group, m] >= 0} == resident
        assert page_stamp[0, group].max() == length + num_tokens - 1
        for t in range(num_tokens):
            block, offset = divmod(length + t, SIZE)
            page = table[0, group, block]
            if page >= 0:
                assert page_block[0, group, page] == block
                assert torch.equal(pages[0, group, page, 0, offset], k[0, group, t])
                assert torch.equal(pages[0, group, page, 1, offset], v[0, group, t])
    if length % SIZE:
        assert pages[:, :, 3, :, : length % SIZE].eq(7.0).all()


def test_extend_with_a_page_for_every_block_keeps_all():
    state = empty(1, 1, 8, 8)
    k, v = torch.randn(2, 1, 1, 100, 3)
    extend(state, k, v, torch.ones(1, 100).bool(), [0])
    assert (state[1][0, 0] >= 0).tolist() == [True] * 7 + [False]


def test_extend_skips_padding_and_rows_without_tokens():
    state = empty(3, 1, 8, 4)
    pages, table, *_ = state
    k, v = torch.randn(2, 3, 1, 6, 3)
    mask = torch.tensor([[True] * 6, [False, True, False, False, True, True], [False] * 6])
    extend(state, k, v, mask, [0, 0, 0])
    assert table[:, 0, 0].ge(0).tolist() == [True, True, False]
    page = table[1, 0, 0]
    assert torch.equal(pages[1, 0, page, 0, :3], k[1, 0, [1, 4, 5]])
    assert pages[1, 0, page, :, 3:].isnan().all()
    assert pages[2].isnan().all()


@pytest.mark.parametrize(
    ("summary", "shapes"), [("pooled_keys", [(9, 4), (8, 4)]), ("key_bounds", [(4, 2, 4)])]
)
def test_update_summary_goes_to_the_summary_of_that_name(summary, shapes):
    tensors = [torch.zeros(1, 2, *shape) for shape in shapes]
    k = torch.ones(1, 2, 10, 4)
    lengths, mask = torch.zeros(1, dtype=torch.int32), torch.ones(1, 10, dtype=torch.bool)
    update_summary(k, lengths, number_tokens(mask, lengths), tensors, summary, 4, SIZE, 8, 4)
    assert tensors[0][:, :, 0].eq(1.0).any()


def test_remembered_ids_are_recalled():
    last = torch.full((1, 2, 3), -1, dtype=torch.int32)
    assert recall_ids(last).eq(-1).all()
    ids = torch.arange(6, dtype=torch.int32).view(1, 2, 3)
    remember_ids(ids, last)
    recalled = recall_ids(last)
    assert torch.equal(recalled, ids)
    last.fill_(9)
    assert torch.equal(recalled, ids), "the recall must not change with the next step"


def test_lengths_advance_by_the_real_tokens():
    lengths = torch.tensor([3, 0], dtype=torch.int32)
    advance_lengths(None, lengths)
    assert lengths.tolist() == [4, 1]
    advance_lengths(torch.tensor([[True, False, True], [False] * 3]), lengths)
    assert lengths.tolist() == [6, 1]
    assert lengths.dtype == torch.int32
