"""Copies move bytes: everything is compared as bytes, and what was not asked for must stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_compile.kernels.gpu.copy import (
    GATHER_PROGRAMS,
    chunk_words,
    copy_runs,
    gather,
    store_tail,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SENTINEL = 0x5A


def noise(*shape, dtype):
    """Return random bytes of a shape, NaN and infinity among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    return raw.view(dtype)


def host_memory(tensor, device):
    """Return a copy that the device can read by address."""
    memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device == "cuda")
    return memory.copy_(tensor)


def addresses(host, device):
    """Return where the blocks of each sequence and group begin, [B, G] int64."""
    step = host[0, 0].numel() * host.element_size()
    pair = torch.arange(host.shape[0] * host.shape[1]).view(host.shape[:2])
    return (host.data_ptr() + pair * step).to(device)


def same(got, want):
    return torch.equal(got.cpu().view(torch.uint8), want.cpu().view(torch.uint8))


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


class Fetch:
    """Host blocks, pages of sentinels, and lists with `misses` entries per sequence and group."""

    def __init__(self, device, misses, selected, block_shape, dtype, num_blocks=9, num_pages=7):
        self.device = device
        batch, groups = len(misses), len(misses[0])
        host = noise(batch, groups, num_blocks, 2, *block_shape, dtype=dtype)
        self.host = host_memory(host, device)
        self.pages = noise(batch, groups, num_pages, 2, *block_shape, dtype=dtype)
        self.pages.view(torch.uint8).fill_(SENTINEL)
        self.want = self.pages.clone()
        self.blocks = torch.full((batch, groups, selected), -1, dtype=torch.int32)
        self.targets = self.blocks.clone()
        for row in range(batch):
            for group, count in enumerate(misses[row]):
                block = torch.randperm(num_blocks)[:count]
                page = torch.randperm(num_pages)[:count]
                self.blocks[row, group, :count] = block.int()
                self.targets[row, group, :count] = page.int()
                self.want[row, group, page] = host[row, group, block]

    def check(self, num_programs):
        before, pages = self.host.clone(), self.pages.clone().to(self.device)
        lists = (self.blocks.to(self.device), self.targets.to(self.device))
        gather(*lists, addresses(self.host, self.device), pages, num_programs)
        synchronize(self.device)
        assert same(pages, self.want)
        assert same(self.host, before)


@settings(max_examples=30)
@given(
    misses=st.integers(1, 3).flatmap(
        lambda groups: st.lists(
            st.lists(st.integers(0, 5), min_size=groups, max_size=groups), min_size=1, max_size=3
        )
    ),
    num_programs=st.integers(1, 8),
)
def test_gather_fetches_the_listed_blocks_and_nothing_else(device, misses, num_programs):
    Fetch(device, misses, 5, (4, 6), torch.float16).check(num_programs)


@pytest.mark.parametrize("num_programs", [*range(1, 9), GATHER_PROGRAMS])
def test_gather_with_any_number_of_programs(device, num_programs):
    Fetch(device, [[5, 0, 2], [1, 3, 0]], 5, (16, 8), torch.float32).check(num_programs)


@pytest.mark.parametrize(
    ("block_kib", "programs", "kib"),
    [
        # 256 KiB of all programs together, at most 32 KiB and a block each, at least a warp's.
        (32, 64, 4), (32, 32, 8), (32, 24, 8), (128, 8, 32), (128, 4, 32), (24, 8, 32),
        (2, 64, 2), (1, 1, 1), (32, 1000, 1),
    ],
)  # fmt: skip
def test_programs_share_what_is_in_flight(block_kib, programs, kib):
    assert chunk_words(256 * block_kib, programs) == 256 * kib


@pytest.mark.parametrize("count", [0, 1, 6])
def test_gather_none_one_or_all(device, count):
    Fetch(device, [[count] * 3] * 2, 6, (8, 12), torch.bfloat16).check(3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_shape", [(16, 96), (64, 96), (128, 96), (64, 128), (2, 2)])
def test_gather_blocks_of_any_length(device, block_shape, dtype):
    """From 16 bytes to three chunks of 32 KiB; the last chunk of most is not full."""
    Fetch(device, [[2, 0], [0, 1]], 2, block_shape, dtype, num_blocks=3, num_pages=3).check(2)


def test_gather_counts_lists_longer_than_one_tile(device):
    """128 lists leave 64 columns to a tile, and 70 do not fit."""
    misses = [[70 if pair in (0, 77) else pair % 2 for pair in range(128)]]
    Fetch(device, misses, 70, (2, 4), torch.float16, num_blocks=71, num_pages=70).check(8)


def check_store(device, lengths, tail_page, block_shape, dtype):
    batch, groups, num_pages, num_blocks = len(lengths), len(tail_page[0]), 4, 5
    pages = noise(batch, groups, num_pages, 2, *block_shape, dtype=dtype)
    host = noise(batch, groups, num_blocks, 2, *block_shape, dtype=dtype)
    host.view(torch.uint8).fill_(SENTINEL)
    host, want = host_memory(host, device), host
    size, stored = block_shape[0], 0
    for row, length in enumerate(lengths):
        for group, page in enumerate(tail_page[row]):
            if length % size == size - 1 and page >= 0:
                want[row, group, length // size] = pages[row, group, page]
                stored += 1
    counter = torch.tensor([11], dtype=torch.int64, device=device)
    on_device = pages.to(device)
    store_tail(
        torch.tensor(tail_page, dtype=torch.int32, device=device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        on_device, addresses(host, device), counter,
    )  # fmt: skip
    synchronize(device)
    assert same(host, want)
    assert same(on_device, pages)
    assert counter.tolist() == [11 + stored]
    return stored


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_shape", [(16, 24), (64, 96), (128, 96)])
def test_store_tail_writes_just_filled_blocks(device, block_shape, dtype):
    size = block_shape[0]
    lengths = [0, 1, size - 2, size - 1, size, 3 * size - 1]
    tail_page = [[0, 3], [1, 2], [2, 1], [3, 0], [0, 0], [2, -1]]
    assert check_store(device, lengths, tail_page, block_shape, dtype) == 3


def test_store_tail_of_every_sequence_and_of_none(device):
    assert check_store(device, [15, 31], [[1, 0], [3, 2]], (16, 4), torch.float32) == 4
    assert check_store(device, [15, 31], [[-1, -1], [-1, -1]], (16, 4), torch.float32) == 0
    assert check_store(device, [14, 16], [[1, 0], [3, 2]], (16, 4), torch.float32) == 0


def check_runs(device, num_bytes, num_runs):
    gap = 32
    step = num_bytes + gap
    source = host_memory(noise(num_runs, step, dtype=torch.uint8), device)
    target = torch.full((num_runs, step), SENTINEL, dtype=torch.uint8)
    order = torch.randperm(num_runs)
    want = target.clone()
    want[order, 16 : 16 + num_bytes] = source[:, gap:]
    memory = target.to(device)
    start = torch.arange(num_runs)
    copy_runs(
        (source.data_ptr() + start * step + gap).to(device),
        (memory.data_ptr() + order * step + 16).to(device),
        num_bytes,
    )
    synchronize(device)
    assert torch.equal(memory.cpu(), want)


@pytest.mark.parametrize("num_bytes", [16, 48, 32752, 32768, 32784, 65536 + 16])
def test_copy_runs_copies_runs_of_any_length(device, num_bytes):
    check_runs(device, num_bytes, 5)


def test_copy_of_no_runs_does_nothing(device):
    none = torch.empty(0, dtype=torch.int64, device=device)
    copy_runs(none, none, 64)


def test_runs_go_to_the_host_too(device):
    source = noise(4, 64, dtype=torch.uint8).to(device)
    target = host_memory(torch.zeros(4, 64, dtype=torch.uint8), device)
    start = 64 * torch.arange(4)
    copy_runs((source.data_ptr() + start).to(device), (target.data_ptr() + start).to(device), 64)
    synchronize(device)
    assert same(target, source)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_large_shapes(device, size, dim):
    dtype = torch.bfloat16
    misses = [[96, 0, 17], [1, 96, 95]]
    fetch = Fetch(device, misses, 96, (size, dim), dtype, num_blocks=99, num_pages=144)
    for num_programs in (1, 3, 8, 64):
        fetch.check(num_programs)
    check_store(device, [3 * size - 1, 7], [[3] * 8, [2] * 8], (size, dim), dtype)
    check_runs(device, 4 * size * dim, 100)


@pytest.mark.gpu
def test_many_sequences():
    misses = torch.randint(0, 5, (64, 8)).tolist()
    Fetch("cuda", misses, 63, (16, 64), torch.bfloat16, num_blocks=9).check(8)


@pytest.mark.gpu
def test_addresses_do_not_overflow():
    shape, num_pages = (2, 128, 256), 33000
    pages = torch.zeros(2, 1, num_pages, *shape, dtype=torch.bfloat16, device="cuda")
    assert pages[0].numel() > 2**31
    host = torch.empty(2, 1, 1, *shape, dtype=torch.bfloat16, pin_memory=True).normal_()
    blocks = torch.zeros(2, 1, 1, dtype=torch.int32, device="cuda")
    where = addresses(host, "cuda")
    gather(blocks, blocks + num_pages - 1, where, pages)
    assert same(pages[:, :, -1], host[:, :, 0])
    assert pages[:, :, :-1].count_nonzero() == 0
    host.zero_()
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    length = torch.tensor([127, 127], dtype=torch.int32, device="cuda")
    store_tail(blocks[..., 0] + num_pages - 1, length, pages, where, counter)
    torch.cuda.synchronize()
    assert same(pages[:, :, -1], host[:, :, 0])
