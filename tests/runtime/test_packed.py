"""What becomes of blocks that are full, in formats that round."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.formats.base import STAYING_KEYS
from sparda_compile.isa.counters import OFFLOADED
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.registry import KV_FORMATS
from sparda_compile.runtime import packed
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.runtime.transfer import fetch_blocks
from sparda_compile.selectors.lowbit import quantize
from sparda_compile.state.layout import CacheLayout, LayerShape, state_name

NAMES = ("int8", "fp8", "int4", "values8", "values4")
RUNS = ("int8", "fp8", "int4")
ROWS, GROUPS, SIZE, DIM, BLOCKS, PAGES = 3, 2, 16, 8, 6, 4


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(blocks, name):
    return KV_FORMATS[name].rounded(blocks)


def empty_host(name):
    run = KV_FORMATS[name].stored(SIZE, DIM, torch.float32)[0]
    return torch.full((ROWS, GROUPS, BLOCKS, *run), 77, dtype=torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_tail_is_rounded_where_it_is_and_fetched_as_that(name):
    pages, host = randn(ROWS, GROUPS, PAGES, 2, SIZE, DIM), empty_host(name)
    before, counters = pages.clone(), torch.zeros(6, dtype=torch.int64)
    lengths = torch.tensor([2 * SIZE - 1, 5, SIZE - 1], dtype=torch.int32)
    tail = torch.tensor([[1, 0], [2, 2], [3, -1]], dtype=torch.int32)
    packed.store_tail(tail, lengths, pages, host, counters, name)
    changed = torch.zeros(ROWS, GROUPS, PAGES, dtype=torch.bool)
    changed[0, 0, 1] = changed[0, 1, 0] = changed[2, 0, 3] = True
    assert torch.equal(pages[changed], rounded(before[changed], name))
    assert torch.equal(pages[~changed], before[~changed])
    assert counters[OFFLOADED] == 3
    # Fetched to another page it is the same.
    ids = torch.tensor([[[1], [1]], [[-1], [-1]], [[0], [-1]]], dtype=torch.int32)
    to = torch.full_like(ids, 2)
    # Where keys stay, a selector's summary has them, by block.
    kept = {}
    if KV_FORMATS[name].summary is not None:
        keys = before.new_zeros(ROWS, GROUPS, BLOCKS, SIZE, DIM)
        for row, group, page, block in ((0, 0, 1, 1), (0, 1, 0, 1), (2, 0, 3, 0)):
            keys[row, group, block] = before[row, group, page, 0]
        kept = dict(zip(STAYING_KEYS, quantize(keys, 4), strict=True))
    fetch_blocks(ids, to, host, pages, name, **kept)
    for row, group, page in ((0, 0, 1), (0, 1, 0), (2, 0, 3)):
        assert torch.equal(pages[row, group, 2], pages[row, group, page])
    assert torch.equal(pages[1], before[1])


@pytest.mark.parametrize("has_host", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_a_prompt_are_rounded_with_and_without_a_page(name, has_host):
    lengths = torch.tensor([0, 21, 30], dtype=torch.int32)
    mask = torch.arange(40) < torch.tensor([[40], [30], [1]])
    tokens = number_tokens(mask, lengths)
    k, v = randn(ROWS, GROUPS, 40, DIM, seed=1), randn(ROWS, GROUPS, 40, DIM, seed=2)
    pages = randn(ROWS, GROUPS, PAGES, 2, SIZE, DIM)
    table = torch.full((ROWS, GROUPS, BLOCKS), -1, dtype=torch.int32)
    table[0, :, 0], table[1, :, 1], table[2, :, 1], table[1, 1, 2] = 3, 2, 1, 0
    old, before = pages.clone(), pages[1, :, 2].clone()
    host = empty_host(name) if has_host else torch.empty(0)
    counters = torch.zeros(6, dtype=torch.int64)
    packed.store_prefix(k, v, tokens, lengths, table, pages, host, counters, name)
    whole = torch.stack([k, v], 2)[1, :, :, 11:27]  # of the second sequence, block 2
    assert torch.equal(pages[1, 1, 0], rounded(whole[1], name))
    assert torch.equal(pages[1, :, 2], rounded(before, name))
    # The third sequence fills nothing; nobody else's page is touched.
    assert torch.equal(pages[2], old[2])
    assert torch.equal(pages[0, :, :3], old[0, :, :3])
    assert counters[OFFLOADED] == (GROUPS * (2 + 2) if has_host else 0)
    if has_host:
        found = KV_FORMATS[name]
        read = found.read(host[1, :, 2], quantize(whole[:, 0], 4), SIZE, DIM, torch.float32)
        assert torch.equal(read, rounded(whole, name))
        assert (host[2] == 77).all()
        assert (host[0, :, 2:] == 77).all()


@pytest.mark.parametrize("has_host", [True, False])
@pytest.mark.parametrize("name", RUNS)
def test_a_full_tail_goes_to_its_page_as_a_run(name, has_host):
    """Of three sequences the second has not filled its block; a page of the third is absent."""
    found, tail = KV_FORMATS[name], randn(ROWS, GROUPS, 2, 2, SIZE, DIM)
    lengths = torch.tensor([2 * SIZE - 1, 5, SIZE - 1], dtype=torch.int32)
    tail_page = torch.tensor([[1, 0], [2, 2], [3, -1]], dtype=torch.int32)
    host = empty_host(name) if has_host else torch.empty(0)
    pages, counters = empty_host(name)[:, :, :PAGES].clone(), torch.zeros(6, dtype=torch.int64)
    before, kept = pages.clone(), tail.clone()
    packed.store_tail(tail_page, lengths, pages, host, counters, name, tail)
    assert torch.equal(tail, kept)
    written = [(0, 0, 1, 1), (0, 1, 0, 1), (2, 0, 3, 0)]
    for row, group, page, block in written:
        run = found.pack(tail[row, group, 0])
        assert torch.equal(pages[row, group, page], run)
        assert not has_host or torch.equal(host[row, group, block], run)
        before[row, group, page] = pages[row, group, page]
    assert torch.equal(pages, before)
    assert counters[OFFLOADED] == (3 if has_host else 0)


@pytest.mark.parametrize("has_host", [True, False])
@pytest.mark.parametrize("name", RUNS)
def test_blocks_of_a_prompt_go_to_their_pages_as_runs(name, has_host):
    found, lengths = KV_FORMATS[name], torch.tensor([0, 21, 30], dtype=torch.int32)
    mask = torch.arange(40) < torch.tensor([[40], [30], [1]])
    tokens = number_tokens(mask, lengths)
    k, v = randn(ROWS, GROUPS, 40, DIM, seed=1), randn(ROWS, GROUPS, 40, DIM, seed=2)
    tail, pages = randn(ROWS, GROUPS, 2, 2, SIZE, DIM), empty_host(name)[:, :, :PAGES].clone()
    table = torch.full((ROWS, GROUPS, BLOCKS), -1, dtype=torch.int32)
    table[0, :, 0], table[1, :, 1], table[2, :, 1], table[1, 1, 2] = 3, 2, 1, 0
    host = empty_host(name) if has_host else torch.empty(0)
    counters = torch.zeros(6, dtype=torch.int64)
    packed.store_prefix(k, v, tokens, lengths, table, pages, host, counters, name, tail)
    new = torch.stack([k, v], 2)
    # The second sequence had 21 tokens: five of its block 1 are what its prompt has found.
    first = torch.cat([tail[1, :, 1, :, :5], new[1, :, :, :11]], 2)
    want = {(0, 3): new[0, :, :, :16], (1, 2): first, (1, 0): new[1, :, :, 11:27]}
    assert torch.equal(pages[0, :, 3], found.pack(want[0, 3]))
    assert torch.equal(pages[1, :, 2], found.pack(want[1, 2]))
    assert torch.equal(pages[1, 1, 0], found.pack(want[1, 0])[1])
    assert (pages[2] == 77).all()
    assert (pages[0, :, :3] == 77).all()
    assert counters[OFFLOADED] == (GROUPS * (2 + 2) if has_host else 0)
    if has_host:
        assert torch.equal(host[1, :, 1], found.pack(first))
        assert torch.equal(host[1, :, 2], found.pack(want[1, 0]))
        assert (host[2] == 77).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_moves_to_cpu_memory_keeps_what_it_says(name):
    """As it grows past the limit of the device: rounded blocks are not rounded again."""
    config = SpardaConfig(
        mode="query", block_size=SIZE, top_k=1, local_blocks=1, kv_format=name, offload="auto",
        device_bytes=200_000,
    )  # fmt: skip
    shape = LayerShape(0, "sparse", GROUPS, DIM, 0, torch.bfloat16)
    kv = KVCache(CacheLayout(config, (shape,), 1, 96), torch.device("cpu"))
    assert not kv.layout.offload
    pages = kv.state[state_name("pages", 0)]
    blocks = randn(*pages.shape).bfloat16()
    pages.copy_(rounded(blocks, name))
    for kept, new in zip(kv.layout.staying_keys(0), quantize(blocks[:, :, :, 0], 4), strict=False):
        kv.state[state_name(kept, 0)].copy_(new)
    for table in ("block_table", "page_block"):
        kv.state[state_name(table, 0)].copy_(torch.arange(6))
    kv.state["sparda_lengths"].fill_(96)
    kv.longest = kv.num_columns = 96
    grown = kv.grow(dataclasses.replace(kv.layout, max_tokens=4096))
    assert grown.layout.offload
    host = grown.host_blocks[state_name("host", 0)]
    found = KV_FORMATS[name]
    kept = [grown.state[state_name(n, 0)][:, :, :6] for n in grown.layout.staying_keys(0)]
    assert torch.equal(found.read(host[:, :, :6], kept, SIZE, DIM, pages.dtype), pages)
    bigger = grown.grow(dataclasses.replace(grown.layout, max_tokens=8192))
    assert torch.equal(bigger.host_blocks[state_name("host", 0)][:, :, :6], host[:, :, :6])


@pytest.mark.parametrize("before", ["int8", "model"])
def test_pages_of_runs_move_to_cpu_memory_with_the_open_block(before):
    """From pages of runs, and from those of the model's dtype that `auto` had on the device."""
    settings = {
        "mode": "query", "block_size": SIZE, "top_k": 1, "local_blocks": 1, "offload": "auto",
        "device_bytes": 60_000, "page_format": "stored",
    }  # fmt: skip
    shape = LayerShape(0, "sparse", GROUPS, DIM, 0, torch.bfloat16)
    config = SpardaConfig(kv_format=before, **settings)
    kv, found = (
        KVCache(CacheLayout(config, (shape,), 1, 96), torch.device("cpu")),
        KV_FORMATS["int8"],
    )
    blocks = randn(1, GROUPS, 6, 2, SIZE, DIM).bfloat16()
    blocks[:, :, :5] = rounded(blocks[:, :, :5], "int8")
    pages = kv.state[state_name("pages", 0)]
    if before == "int8":
        pages.copy_(found.pack(blocks))
        kv.state[state_name("tail", 0)][:, :, 0] = blocks[:, :, 5]
    else:
        pages.copy_(blocks)
    for table in ("block_table", "page_block"):
        kv.state[state_name(table, 0)].copy_(torch.arange(6))
    kv.state["sparda_lengths"].fill_(90)
    kv.longest = kv.num_columns = 90
    assert not kv.layout.offload
    larger = CacheLayout(config.replace(kv_format="int8"), (shape,), 1, 4096)
    grown = kv.grow(larger)
    assert grown.layout.offload
    host = grown.host_blocks[state_name("host", 0)]
    assert torch.equal(host[:, :, :5], found.pack(blocks[:, :, :5]))
    assert torch.equal(grown.state[state_name("tail", 0)][:, :, 0], blocks[:, :, 5])
    table = grown.state[state_name("block_table", 0)]
    assert ((table >= 0).nonzero()[:, 2] == 5).all()
    again = grown.grow(dataclasses.replace(larger, max_tokens=8192))
    assert torch.equal(again.state[state_name("tail", 0)][:, :, 0], blocks[:, :, 5])
