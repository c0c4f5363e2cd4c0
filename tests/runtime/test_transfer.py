from __future__ import annotations

import pytest
import torch

from sparda_compile.isa.engines import DeferredEngine, use_engine
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.runtime.transfer import (
    fetch_blocks,
    fork_stream,
    offload_blocks,
    prefetch_blocks,
    store_blocks,
    wait_blocks,
)

SIZE = 16


@pytest.fixture
def pools():
    """Return host [2, 2, 4, 2, P, 3] and pages [2, 2, 3, 2, P, 3], every element another."""
    host = torch.arange(2 * 2 * 4 * 2 * SIZE * 3).float().view(2, 2, 4, 2, SIZE, 3)
    return host, -1 - torch.arange(2 * 2 * 3 * 2 * SIZE * 3).float().view(2, 2, 3, 2, SIZE, 3)


BLOCKS = torch.tensor([[[3, 1], [-1, -1]], [[0, -1], [2, -1]]], dtype=torch.int32)
PAGES = torch.tensor([[[0, 2], [-1, -1]], [[1, -1], [1, -1]]], dtype=torch.int32)


def fetched(host, pages):
    pages = pages.clone()
    for row, group, block, page in (
        (0, 0, 3, 0), (0, 0, 1, 2), (1, 0, 0, 1), (1, 1, 2, 1),
    ):  # fmt: skip
        pages[row, group, page] = host[row, group, block]
    return pages


def test_fetch_copies_the_listed_blocks_and_nothing_else(pools):
    host, pages = pools
    want, before = fetched(host, pages), host.clone()
    fetch_blocks(BLOCKS, PAGES, host, pages)
    assert torch.equal(pages, want)
    assert torch.equal(host, before)


def test_runs_move_as_they_are():
    """To pages that hold what CPU memory does."""
    host = torch.randint(0, 256, (2, 2, 4, 48), dtype=torch.uint8)
    pages = torch.zeros(2, 2, 3, 48, dtype=torch.uint8)
    want = fetched(host, pages)
    fetch_blocks(BLOCKS, PAGES, host, pages)
    assert torch.equal(pages, want)


def test_prefetch_has_arrived_after_the_wait(pools):
    host, pages = pools
    want, before = fetched(host, pages), pages.clone()
    with use_engine(DeferredEngine()) as engine:
        fork = fork_stream([BLOCKS], 0)
        ticket = prefetch_blocks(BLOCKS, PAGES, host, pages, 1, fork)
        assert ticket.shape == fork.shape == (0,)
        assert torch.equal(pages, before)
        wait_blocks(ticket, [pages], [BLOCKS, PAGES], 1)
        assert engine.num_pending == 0
    assert torch.equal(pages, want)


def test_without_a_host_pool_nothing_moves(pools):
    _, pages = pools
    before, counters = pages.clone(), torch.zeros(5, dtype=torch.int64)
    fetch_blocks(BLOCKS, PAGES, torch.empty(0), pages)
    lengths = torch.tensor([15, 31], dtype=torch.int32)
    tail = torch.zeros(2, 2, dtype=torch.int32)
    store_blocks([], tail, [], lengths, None, pages, torch.empty(0), counters)
    assert torch.equal(pages, before)
    assert not counters.any()


@pytest.mark.parametrize("in_line", [True, False])
def test_store_takes_the_tail_blocks_that_the_token_filled(pools, in_line):
    host, pages = pools
    tail = torch.tensor([[2, 0], [1, 1]], dtype=torch.int32)
    lengths = torch.tensor([47, 46], dtype=torch.int32)
    want = host.clone()
    want[0, 0, 2], want[0, 1, 2] = pages[0, 0, 2], pages[0, 1, 0]
    counters = torch.zeros(5, dtype=torch.int64)
    args = ([], tail, [], lengths, None, pages, host, counters)
    if in_line:
        store_blocks(*args)
    else:
        with use_engine(DeferredEngine()):
            ticket = offload_blocks(*args, 7, fork_stream([tail], 6))
            assert not counters.any()
            wait_blocks(ticket, [host], [tail], 7)
    assert torch.equal(host, want)
    assert counters.tolist() == [0, 0, 0, 0, 2]


def test_store_takes_every_block_that_a_prompt_filled(pools):
    """Row 0 has 20 tokens and gets 30; row 1 has none and gets 10, which fill no block."""
    host, pages = pools
    k, v = torch.randn(2, 2, 2, 30, 3)
    mask = torch.arange(30) >= torch.tensor([[0], [20]])
    lengths = torch.tensor([20, 0], dtype=torch.int32)
    table = torch.full((2, 2, 4), -1, dtype=torch.int32)
    table[0, :, 1] = torch.tensor([2, 0], dtype=torch.int32)
    want = host.clone()
    want[0, 0, 1], want[0, 1, 1] = pages[0, 0, 2], pages[0, 1, 0]
    # Positions 32 to 47 are the new tokens 12 to 27.
    want[0, :, 2, 0], want[0, :, 2, 1] = k[0, :, 12:28], v[0, :, 12:28]
    counters = torch.zeros(5, dtype=torch.int64)
    tokens = number_tokens(mask, lengths)
    store_blocks([k, v], None, tokens, lengths, table, pages, host, counters)
    assert torch.equal(host, want)
    assert counters.tolist() == [0, 0, 0, 0, 4]
