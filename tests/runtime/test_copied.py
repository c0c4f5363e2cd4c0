"""Blocks that became full go to CPU memory bit for bit; the ops are in `test_transfer.py`."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.isa.counters import OFFLOADED
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.runtime import copied

ROWS, GROUPS, SIZE, DIM, BLOCKS, PAGES = 2, 2, 16, 4, 5, 3


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_full_tail_is_copied_whatever_it_holds(dtype):
    """NaN too; what is not full, or has no page, is left alone."""
    pages = randn(ROWS, GROUPS, PAGES, 2, SIZE, DIM, dtype=dtype)
    pages[0, 0, 2, 1, 3] = float("nan")
    host = torch.zeros(ROWS, GROUPS, BLOCKS, 2, SIZE, DIM, dtype=dtype)
    lengths = torch.tensor([4 * SIZE - 1, SIZE - 2], dtype=torch.int32)
    counters = torch.zeros(6, dtype=torch.int64)
    tail_page = torch.tensor([[2, -1], [0, 1]], dtype=torch.int32)
    copied.store_tail(tail_page, lengths, pages, host, counters)
    mine = host[0, 0, 3].view(torch.uint8)
    assert torch.equal(mine, pages[0, 0, 2].view(torch.uint8))
    host[0, 0, 3] = 0.0
    assert not host.any()
    assert counters[OFFLOADED] == 1


def test_a_prompt_that_fills_no_block_copies_nothing():
    lengths, mask = torch.tensor([3, 20], dtype=torch.int32), torch.ones(2, 5, dtype=torch.bool)
    k = randn(ROWS, GROUPS, 5, DIM)
    pages, host = randn(ROWS, GROUPS, PAGES, 2, SIZE, DIM), torch.zeros(2, 2, 5, 2, SIZE, DIM)
    table = torch.zeros(ROWS, GROUPS, BLOCKS, dtype=torch.int32)
    counters = torch.zeros(6, dtype=torch.int64)
    tokens = number_tokens(mask, lengths)
    copied.store_prefix(k, k, tokens, lengths, table, pages, host, counters)
    assert not host.any()
    assert not counters.any()
