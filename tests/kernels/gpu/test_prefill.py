"""A prefill's copies by address against the plain ones by index; bytes are compared as bytes."""

from __future__ import annotations

import pytest
import torch
from picked import first

from sparda_compile.kernels.gpu.prefill import load_prefix, store_prefix
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.kernels.past import past_keys_values
from sparda_compile.runtime.copied import store_prefix as store_prefix_reference

GROUPS, NUM_BLOCKS, NUM_PAGES = 2, 9, 6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def noise(*shape, dtype):
    """Return random bytes of a shape, NaN and infinity among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    return raw.view(dtype)


def same(got, want):
    return torch.equal(
        got.cpu().contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)
    )


def addresses(host, device):
    """Return where the blocks of each sequence and group begin, [B, G] int64."""
    step = host[0, 0].numel() * host.element_size()
    pair = torch.arange(host.shape[0] * host.shape[1]).view(host.shape[:2])
    return (host.data_ptr() + pair * step).to(device)


class Cache:
    """Blocks in CPU memory and on pages, all of them noise, and tables that say where they are."""

    def __init__(self, device, batch, size, dim, dtype):
        self.device = device
        block = (2, size, dim)
        host = noise(batch, GROUPS, NUM_BLOCKS, *block, dtype=dtype)
        self.host = torch.empty(host.shape, dtype=dtype, pin_memory=device == "cuda").copy_(host)
        self.pages = noise(batch, GROUPS, NUM_PAGES, *block, dtype=dtype)
        self.table = torch.full((batch, GROUPS, NUM_BLOCKS), -1, dtype=torch.int32)

    def place(self, row, *blocks):
        """Give blocks of a sequence pages, others in each group."""
        for group in range(GROUPS):
            pages = torch.randperm(NUM_PAGES)[: len(blocks)].int()
            self.table[row, group, list(blocks)] = pages

    def on_device(self, *tensors):
        return [t.to(self.device) for t in tensors]


class Store:
    """New tokens of each sequence behind those that it has; `mask` says which are real."""

    num_programs = 5

    def __init__(self, device, lengths, mask, *, size=4, dim=12, dtype=torch.float16):
        self.cache = Cache(device, len(lengths), size, dim, dtype)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.mask = torch.tensor(mask, dtype=torch.bool)
        shape = (len(lengths), GROUPS, self.mask.shape[1], dim)
        self.k, self.v = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype)
        for row, length in enumerate(lengths):
            self.cache.place(row, length // size)

    def check(self, num_stored):
        cache = self.cache
        tokens = number_tokens(self.mask, self.lengths)
        new = (self.k, self.v, *tokens, self.lengths, cache.table, cache.pages)
        want, counters = cache.host.clone(), torch.zeros(5, dtype=torch.int64)
        store_prefix_reference(*new[:2], tokens, *new[5:], want, counters)
        before = cache.host.clone()
        on_device = cache.on_device(*new)
        count = torch.tensor([7], device=cache.device)
        k, v, *tokens, lengths, table, pages = on_device
        home = addresses(cache.host, cache.device)
        store_prefix(k, v, tokens, lengths, table, pages, home, count, self.num_programs)
        if cache.device == "cuda":
            torch.cuda.synchronize()
        assert int(count) - 7 == counters[4] == num_stored
        assert same(cache.host, want)
        assert same(want, before) == (num_stored == 0)
        assert all(map(same, on_device, new))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "dim"), [(4, 12), (16, 60), (64, 96)])
def test_prompt_of_several_blocks(device, size, dim, dtype):
    width = 3 * size + 1
    mask = [first(width, width), first(2 * size, width)]
    Store(device, [0, 0], mask, size=size, dim=dim, dtype=dtype).check(GROUPS * (3 + 2))


def test_ragged_prompts_some_of_which_fill_nothing(device):
    mask = [first(n, 17) for n in (17, 3, 0, 4, 5, 8)]
    Store(device, [0] * 6, mask).check(GROUPS * (4 + 0 + 0 + 1 + 1 + 2))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 11])
@pytest.mark.parametrize("count", [1, 2, 4, 9, 16])
def test_second_turn_begins_anywhere_in_a_block(device, length, count):
    stored = (length + count) // 4 - length // 4
    Store(device, [length], [first(count, count)]).check(GROUPS * stored)


def test_padding_may_be_anywhere(device):
    """On the left as generate has it, on the right, inside, and of a whole sequence."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(5, 19, generator=generator) < 0.6
    mask[0], mask[1], mask[4] = torch.arange(19) >= 7, torch.arange(19) < 12, False
    lengths = [0, 6, 3, 9, 2]
    filled = [(n + int(m.sum())) // 4 - n // 4 for n, m in zip(lengths, mask, strict=True)]
    assert min(filled[:4]) >= 2
    Store(device, lengths, mask.tolist()).check(GROUPS * sum(filled))


def test_no_full_block_anywhere_stores_nothing(device):
    Store(device, [0, 5], [first(3, 3), first(2, 3)]).check(0)


def test_strided_keys_and_values(device):
    """As attention leaves them: [B, T, G, D] with two dimensions swapped."""
    store = Store(device, [2, 5], [first(11, 11), first(9, 11)])
    for name in ("k", "v"):
        swapped = getattr(store, name).transpose(1, 2).contiguous().transpose(1, 2)
        assert not swapped.is_contiguous()
        setattr(store, name, swapped)
    store.check(GROUPS * (3 + 2))


def check_load(cache, num_blocks, *, offload):
    host = cache.host if offload else torch.empty(0)
    table = cache.table[:, :, :num_blocks]
    want = past_keys_values(cache.pages, host, table, torch.zeros(len(table)))
    pages, table = cache.on_device(cache.pages, cache.table)
    where = addresses(cache.host, cache.device) if offload else torch.empty(0, device=cache.device)
    before = cache.host.clone()
    blocks = load_prefix(pages, where, table, num_blocks)
    assert blocks.shape == (*cache.pages.shape[:2], num_blocks, *cache.pages.shape[3:])
    for got, wanted in zip(blocks.unbind(3), want, strict=True):
        assert same(got.flatten(2, 3), wanted)
    assert same(pages, cache.pages)
    assert same(cache.host, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "dim"), [(4, 12), (16, 60), (64, 96)])
def test_past_comes_from_pages_and_from_the_host(device, size, dim, dtype):
    cache = Cache(device, 2, size, dim, dtype)
    cache.place(0, 0, 3, 4)
    cache.place(1, 2)
    check_load(cache, 5, offload=True)


@pytest.mark.parametrize("num_blocks", [0, 1, NUM_BLOCKS])
@pytest.mark.parametrize("placed", [(), (0, 2, 8), (0, 1, 2, 3, 4, 5)])
def test_any_share_of_the_past_may_have_pages(device, placed, num_blocks):
    cache = Cache(device, 3, 4, 12, torch.float32)
    for row in range(3):
        cache.place(row, *placed)
    check_load(cache, num_blocks, offload=True)


def test_without_offload_everything_has_a_page(device):
    """Only what lies past a sequence's end has none, and there it may be anything."""
    cache = Cache(device, 2, 4, 12, torch.bfloat16)
    cache.place(0, 0, 1, 2, 3, 4, 5)
    cache.place(1, 0, 1)
    check_load(cache, 6, offload=False)


def test_one_turn_is_read_back_by_the_next(device):
    """Three full blocks and a part of one: the host has the full ones, a page has the rest."""
    store = Store(device, [0], [first(14, 14)], dtype=torch.float32)
    cache = store.cache
    cache.pages[0, torch.arange(GROUPS), cache.table[0, :, 0].long(), 0] = store.k[0, :, :4]
    cache.pages[0, torch.arange(GROUPS), cache.table[0, :, 0].long(), 1] = store.v[0, :, :4]
    store.check(3 * GROUPS)
    cache.table.fill_(-1)
    cache.place(0, 3)
    pages, table = cache.on_device(cache.pages, cache.table)
    blocks = load_prefix(pages, addresses(cache.host, device), table, 4)
    keys, values = (t.flatten(2, 3) for t in blocks.unbind(3))
    assert same(keys[0, :, :12], store.k[0, :, :12])
    assert same(values[0, :, :12], store.v[0, :, :12])
