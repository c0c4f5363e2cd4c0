"""A prompt's tokens and pages by kernels against the plain ops; every byte of state is compared."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels.gpu.extend import Numbered, Resident, extend_kv, number_tokens
from sparda_compile.kernels.number_tokens import number_tokens as number_tokens_reference
from sparda_compile.kernels.prefill_attention import token_positions
from sparda_compile.runtime.append import extend_kv as extend_kv_reference
from sparda_compile.runtime.block_table import assign_pages

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def masks(generator, batch, num_tokens):
    """Return [B, T] bool: whole, padded on the left and on the right, with holes, and empty."""
    kinds = torch.randint(0, 5, (batch,), generator=generator).tolist()
    token = torch.arange(num_tokens)
    rows = []
    for kind in kinds:
        cut = int(torch.randint(0, num_tokens + 1, (), generator=generator))
        holes = torch.rand(num_tokens, generator=generator) < 0.5
        rows.append([token >= 0, token >= cut, token < cut, holes, token < 0][kind])
    return torch.stack(rows)


def new_tokens(layout, generator, batch, groups, num_tokens, dim, dtype):
    """Return keys or values [B, G, T, D] as a model lays them out."""
    shape = (batch, groups, num_tokens, dim)
    if layout == "transposed":
        shape = (batch, num_tokens, groups, dim)
    if layout == "sliced":
        shape = (batch, num_tokens, 3 * groups, dim)
    if layout == "gaps":
        shape = (batch, groups, num_tokens, 2 * dim)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    if layout == "sliced":
        tensor = tensor[:, :, groups:-groups]
    if layout == "gaps":
        return tensor[..., ::2]
    return tensor if layout == "plain" else tensor.transpose(1, 2)


class Pages:
    """The pages of a cache in use: what they hold is noise, the tables agree with each other."""

    def __init__(self, generator, lengths, groups, num_blocks, num_pages, size, dim, dtype):
        batch = len(lengths)
        self.generator, self.size, self.num_pages = generator, size, num_pages
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        shape = (batch, groups, num_pages, 2, size, dim)
        self.pages = torch.randn(shape, generator=generator).to(dtype)
        self.tables = [
            torch.full((batch, groups, count), -1, dtype=torch.int32)
            for count in (num_blocks, num_pages, num_pages)
        ]
        if num_pages < num_blocks:
            for stamp in range(3):
                self.take(stamp * 90)
        for row, length in enumerate(lengths):
            used = -(-length // size)
            if num_pages == num_blocks:
                for table in self.tables[:2]:
                    table[row, :, :used] = torch.arange(used)
                self.tables[2][row, :, :used] = torch.arange(used)

    def take(self, stamp):
        """Give pages to some blocks of the past, and to the one that is being written."""
        batch, groups, _ = self.tables[0].shape
        ids = torch.full((batch, groups, self.num_pages), -1, dtype=torch.int32)
        for row, length in enumerate(self.lengths.tolist()):
            blocks = -(-length // self.size)
            for group in range(groups):
                count = min(blocks, self.num_pages - 2)
                chosen = set(torch.randperm(blocks, generator=self.generator)[:count].tolist())
                if length % self.size:
                    chosen.add(length // self.size)
                ids[row, group, : len(chosen)] = torch.tensor(sorted(chosen), dtype=torch.int32)
        assign_pages(ids, torch.full((batch,), stamp, dtype=torch.int32), *self.tables, "lru")

    def selections(self, mask, num_selected):
        """Return ids [B, G, T, K] of blocks up to each token's own, -1 behind and for padding."""
        position = token_positions(self.lengths, mask, mask.shape[1])
        batch, groups, num_blocks = self.tables[0].shape
        score = torch.rand(batch, groups, mask.shape[1], num_blocks, generator=self.generator)
        current = (position // self.size).masked_fill(position < 0, -1)[:, None, :, None]
        ids = score.sort(-1).indices[..., :num_selected]
        ids = ids.masked_fill(ids > current, num_blocks).sort(-1).values
        return ids.masked_fill(ids == num_blocks, -1).int()


def same(got, want):
    return torch.equal(
        got.cpu().contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)
    )


def check_extend(device, cache, k, v, mask, resident, *, is_tail=False):
    pool = cache.pages
    if is_tail:
        shape = (*pool.shape[:2], 2, *pool.shape[3:])
        pool = torch.randn(shape, generator=cache.generator).to(pool.dtype)
    want = [t.clone() for t in (pool, *cache.tables)]
    got = [t.clone().to(device) for t in want]
    tokens = number_tokens_reference(mask, cache.lengths)
    extend_kv_reference(
        k, v, resident.block_ids, tokens, cache.lengths, *want,
        resident.sink_blocks, resident.local_blocks, resident.eviction, is_tail,
    )  # fmt: skip
    ids = resident.block_ids if resident.block_ids is None else resident.block_ids.to(device)
    k, v, lengths, *numbered = (t.to(device) for t in (k, v, cache.lengths, *tokens))
    resident = resident._replace(block_ids=ids)
    extend_kv(k, v, Numbered(*numbered), lengths, got[0], got[1:], resident, is_tail=is_tail)
    for name, mine, its in zip(("pages", "table", "block", "stamp"), got, want, strict=True):
        assert same(mine, its), name
    return want


def draw(seed, dtype=torch.float16, layout="plain", size=16):
    """Return a cache in use, new tokens and a mask, by a seed."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    batch, groups = ((3, 1), (2, 2), (2, 3), (1, 8))[seed % 4]
    num_blocks, num_tokens = number(7, 14), number(1, 5 * size)
    num_pages = num_blocks if seed % 5 == 0 else number(6, num_blocks)
    room = num_blocks * size - num_tokens
    lengths = [max(0, number(-size, room)) for _ in range(batch)]
    dim = (8, 12, 20)[seed % 3]
    cache = Pages(generator, lengths, groups, num_blocks, num_pages, size, dim, dtype)
    shape = (generator, batch, groups, num_tokens, dim, dtype)
    k, v = (new_tokens(layout, *shape) for _ in range(2))
    return cache, k, v, masks(generator, batch, num_tokens)


@pytest.mark.parametrize("layout", ["plain", "sliced"])
@pytest.mark.parametrize("seed", range(8))
def test_beside_pages_of_runs_the_open_block_alone_is_written(device, seed, layout):
    """To the tail, which keeps what it had; pages are given as ever."""
    cache, k, v, mask = draw(seed, DTYPES[seed % 3], layout)
    check_extend(device, cache, k, v, mask, Resident(None, 1, 2, "lru"), is_tail=True)


def test_the_tail_keeps_what_it_had_for_the_store(device):
    """One sequence goes on in its block, one ends two blocks further on, one has no token."""
    cache, k, v, mask = draw(4, torch.float32)  # which is ragged
    size, total = cache.size, cache.lengths + mask.sum(1).int()
    tail, *_ = check_extend(device, cache, k, v, mask, Resident(None, 1, 2, "lru"), is_tail=True)
    for row in range(len(mask)):
        kept = (
            int(cache.lengths[row]) % size
            if total[row] // size == cache.lengths[row] // size
            else 0
        )
        assert torch.equal(tail[row, :, 0, :, :kept], tail[row, :, 1, :, :kept])
        new = int(total[row]) % size - kept
        columns = torch.where(mask[row])[0]
        columns = columns[len(columns) - new :]
        assert torch.equal(tail[row, :, 0, 0, kept : kept + new], k[row, :, columns])
        assert torch.equal(tail[row, :, 0, 1, kept : kept + new], v[row, :, columns])


@pytest.mark.parametrize("seed", range(12))
def test_numbers_are_positions_and_their_inverse(device, seed):
    generator = torch.Generator().manual_seed(seed)
    batch, num_tokens = 3, (1, 2, 31, 32, 33, 4097)[seed % 6]
    mask = masks(generator, batch, num_tokens)
    lengths = torch.randint(0, 100, (batch,), generator=generator, dtype=torch.int32)
    positions, columns, totals = number_tokens(mask.to(device), lengths.to(device))
    want = token_positions(lengths, mask, num_tokens)
    assert torch.equal(positions.cpu().long(), want)
    assert torch.equal(totals.cpu(), lengths + mask.sum(1).int())
    assert torch.equal(columns.cpu().long().sort(1).values, torch.arange(num_tokens).expand(3, -1))
    for row in range(batch):
        real = int(mask[row].sum())
        assert torch.equal(columns[row, :real].cpu().long(), torch.where(mask[row])[0])


@pytest.mark.parametrize("eviction", ["lru", "fifo"])
@pytest.mark.parametrize("seed", range(12))
def test_a_dense_prompt_goes_where_the_reference_puts_it(device, seed, eviction):
    cache, k, v, mask = draw(seed)
    check_extend(device, cache, k, v, mask, Resident(None, 1, seed % 3, eviction))


@pytest.mark.parametrize("eviction", ["lru", "fifo"])
@pytest.mark.parametrize("seed", range(20, 32))
def test_what_the_last_token_selected_stays(device, seed, eviction):
    cache, k, v, mask = draw(seed)
    ids = cache.selections(mask, min(3 + seed % 2, cache.num_pages - 4))
    check_extend(device, cache, k, v, mask, Resident(ids, seed % 2, 1, eviction))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "gaps"])
@pytest.mark.parametrize("size", [16, 64])
def test_keys_and_values_of_any_layout(device, layout, dtype, size):
    cache, k, v, mask = draw(7, dtype, layout, size)
    assert k.is_contiguous() == (layout == "plain") or k.shape[1] == 1
    check_extend(device, cache, k, v, mask, Resident(None, 1, 1, "lru"))


def test_more_blocks_than_pages_keep_the_first(device):
    """A prompt with more sinks and local blocks than pages: the lowest ids get them."""
    generator = torch.Generator().manual_seed(0)
    cache = Pages(generator, [0, 0], 2, 9, 4, 16, 8, torch.float32)
    k, v = (new_tokens("plain", generator, 2, 2, 130, 8, torch.float32) for _ in range(2))
    mask = torch.ones(2, 130, dtype=torch.bool)
    _, table, *_ = check_extend(device, cache, k, v, mask, Resident(None, 3, 4, "lru"))
    assert table[0, 0].ge(0).tolist() == [True] * 3 + [False, True] + [False] * 4


def test_no_real_token_changes_no_byte_of_a_page(device):
    cache, k, v, mask = draw(3)
    before = cache.pages.clone()
    pages, *_ = check_extend(device, cache, k, v, mask & False, Resident(None, 1, 1, "fifo"))
    assert same(pages, before)
