"""Kernels that pack and round blocks against the plain ones; numbers are compared as bytes."""

from __future__ import annotations

import pytest
import torch
from picked import first

from sparda_compile.kernels.gpu import packed_store
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.registry import KV_FORMATS
from sparda_compile.runtime import packed
from sparda_compile.selectors.lowbit import quantize

# Infinity less infinity, and what that becomes as an integer that nobody reads; and slots of no
# token in units of a line of one tiny number.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what} encountered:RuntimeWarning")
    for what in ("invalid value", "overflow")
]

NAMES = ("int8", "fp8", "int4", "values8", "values4")
RUNS = ("int8", "fp8", "int4")
SIZES = [
    *((16, 60, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    (48, 96, torch.bfloat16), (64, 128, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("has_host", [True, False])
@pytest.mark.parametrize(("size", "dim", "dtype"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_full_tail_is_stored_and_rounded(device, case, name, size, dim, dtype, has_host):
    """Of three sequences the second has not filled its block, and a page of the third is absent."""
    found, pages = KV_FORMATS[name], case.blocks(3, 1, 3, 2, size, dim, dtype=dtype)
    lengths = torch.tensor([2 * size - 1, size - 2, size - 1], dtype=torch.int32)
    tail = torch.tensor([[2], [1], [-1]], dtype=torch.int32)
    host = torch.full((3, 1, 2, *found.stored(size, dim, dtype)[0]), 9, dtype=torch.uint8)
    want_host = host.clone() if has_host else torch.empty(0)
    want, counters = pages.clone(), torch.zeros(6, dtype=torch.int64)
    packed.store_tail(tail, lengths, want, want_host, counters, name)
    runs, at = case.memory(host, device)
    count, got = torch.tensor([5], device=device), pages.clone().to(device)
    at = at if has_host else torch.empty(0, device=device)
    packed_store.store_tail(tail.to(device), lengths.to(device), got, at, count, name)
    case.wait(device)
    assert case.same(got, want)
    assert not case.same(pages, want)
    assert int(count) - 5 == counters.sum() == has_host
    assert torch.equal(runs[1:], host[1:])
    if has_host:
        assert case.same_runs(name, runs[0, :, 1], want_host[0, :, 1], size, dim, dtype)
        # What the page has is what is read back from there.
        keys = quantize(pages[0, 0, 2, 0], 4)
        assert case.same(got[0, 0, 2], found.read(runs[0, 0, 1], keys, size, dim, dtype))


@pytest.mark.parametrize("has_host", [True, False])
@pytest.mark.parametrize(("size", "dim", "dtype"), SIZES)
@pytest.mark.parametrize("name", RUNS)
def test_a_full_tail_is_stored_as_a_run(device, case, name, size, dim, dtype, has_host):
    """Of three sequences the second has not filled its block, and a page of the third is absent."""
    found, tail = KV_FORMATS[name], case.blocks(3, 1, 2, 2, size, dim, dtype=dtype)
    lengths = torch.tensor([2 * size - 1, size - 2, size - 1], dtype=torch.int32)
    tail_page = torch.tensor([[2], [1], [-1]], dtype=torch.int32)
    run = found.stored(size, dim, dtype)[0]
    host = torch.full((3, 1, 2, *run), 9, dtype=torch.uint8)
    pages, count = torch.full((3, 1, 3, *run), 7, dtype=torch.uint8), torch.tensor([5])
    runs, at = case.memory(host, device)
    at = at if has_host else torch.empty(0, device=device)
    kept, got, count = tail.to(device), pages.clone().to(device), count.to(device)
    args = (tail_page.to(device), lengths.to(device), got, at, count, name, kept)
    packed_store.store_tail(*args)
    case.wait(device)
    assert int(count) - 5 == has_host
    assert case.same(kept, tail)
    want = found.pack(tail[0, 0, 0])
    assert case.same_runs(name, got[0, 0, 2].cpu(), want, size, dim, dtype)
    pages[0, 0, 2] = got[0, 0, 2].cpu()
    assert torch.equal(got.cpu(), pages)
    assert torch.equal(runs[1:], host[1:])
    assert not has_host or case.same_runs(name, runs[0, 0, 1], want, size, dim, dtype)


class Prompt:
    """New tokens behind others, and tables; the first block that gets tokens has a page."""

    groups = 2

    def __init__(self, case, lengths, mask, *, size=16, dim=24, dtype=torch.float16):
        self.case, self.size, self.dim, self.dtype = case, size, dim, dtype
        self.lengths, self.mask = torch.tensor(lengths, dtype=torch.int32), torch.tensor(mask)
        batch, num_tokens = self.mask.shape
        new = case.blocks(2, batch, num_tokens, 8, dim, dtype=dtype)[..., : self.groups, :]
        self.k, self.v = new[0].transpose(1, 2), new[1].transpose(1, 2).contiguous()
        self.pages = case.blocks(batch, self.groups, 4, 2, size, dim, dtype=dtype, seed=1)
        self.table = torch.full((batch, self.groups, 6), -1, dtype=torch.int32)
        for row, length in enumerate(lengths):
            for group in range(self.groups):
                self.table[row, group, length // size] = 2 - group
                self.table[row, group, (length // size + 2) % 6] = 3
        self._extend()

    def _extend(self):
        """Write new tokens of the first block to its page, as `extend_kv` does."""
        for row, length in enumerate(self.lengths.tolist()):
            room = self.size - length % self.size
            columns = torch.where(self.mask[row])[0][:room]
            slots = length % self.size + torch.arange(len(columns))
            for group in range(self.groups):
                page = self.pages[row, group, self.table[row, group, length // self.size]]
                page[0, slots] = self.k[row, group, columns]
                page[1, slots] = self.v[row, group, columns]

    def check(self, device, name, *, has_host=True):
        tokens = number_tokens(self.mask, self.lengths)
        run = KV_FORMATS[name].stored(self.size, self.dim, self.dtype)[0]
        host = torch.full((*self.table.shape, *run), 9, dtype=torch.uint8)
        want_host = host.clone() if has_host else torch.empty(0)
        want, counters = self.pages.clone(), torch.zeros(6, dtype=torch.int64)
        packed.store_prefix(
            self.k, self.v, tokens, self.lengths, self.table, want, want_host, counters, name
        )
        runs, at = self.case.memory(host, device)
        got = self.pages.clone().to(device)
        count = torch.zeros(1, dtype=torch.int64, device=device)
        at = at if has_host else torch.empty(0, device=device)
        new = [t.to(device) for t in (self.k, self.v, *tokens, self.lengths, self.table)]
        packed_store.store_prefix(*new[:2], new[2:5], *new[5:], got, at, count, name, None, 5)
        self.case.wait(device)
        assert self.case.same(got, want)
        filled = (tokens[2] // self.size - self.lengths // self.size).sum() * self.groups
        assert filled > 0
        assert int(count) == counters.sum() == (filled if has_host else 0)
        if has_host:
            written = (want_host != 9).any(-1)
            assert int(written.sum()) == filled
            assert torch.equal(runs[~written], host[~written])
            sizes = (self.size, self.dim, self.dtype)
            assert self.case.same_runs(name, runs[written], want_host[written], *sizes)

    def check_runs(self, device, name, *, has_host=True):
        """Check the same beside pages of stored runs; what was open is where a prompt found it."""
        found, sizes = KV_FORMATS[name], (self.size, self.dim, self.dtype)
        tokens = number_tokens(self.mask, self.lengths)
        tail = self.case.blocks(*self.table.shape[:2], 2, 2, *sizes[:2], dtype=self.dtype, seed=2)
        run = found.stored(*sizes)[0]
        host = torch.full((*self.table.shape, *run), 9, dtype=torch.uint8)
        pages = torch.full((*self.table.shape[:2], 4, *run), 9, dtype=torch.uint8)
        want, want_host = pages.clone(), host.clone() if has_host else torch.empty(0)
        counters = torch.zeros(6, dtype=torch.int64)
        stored = (want, want_host, counters, name, tail)
        packed.store_prefix(self.k, self.v, tokens, self.lengths, self.table, *stored)
        runs, at = self.case.memory(host, device)
        count = torch.zeros(1, dtype=torch.int64, device=device)
        at = at if has_host else torch.empty(0, device=device)
        new = [t.to(device) for t in (self.k, self.v, *tokens, self.lengths, self.table)]
        got, kept = pages.clone().to(device), tail.to(device)
        packed_store.store_prefix(*new[:2], new[2:5], *new[5:], got, at, count, name, kept, 5)
        self.case.wait(device)
        assert self.case.same(kept, tail)
        assert int(count) == counters.sum()
        for mine, its in ((got.cpu(), want), *([(runs, want_host)] if has_host else [])):
            written = (its != 9).any(-1)
            assert written.any()
            assert (mine[~written] == 9).all()
            assert self.case.same_runs(name, mine[written], its[written], *sizes)


@pytest.mark.parametrize("has_host", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_several_blocks_and_second_turns(device, case, name, has_host):
    """Ragged, with padding on both sides, one that fills nothing and one with no token."""
    mask = [first(49, 49), first(20, 49), [i >= 9 for i in range(49)], first(0, 49)]
    Prompt(case, [0, 13, 31, 15], mask).check(device, name, has_host=has_host)


@pytest.mark.parametrize("has_host", [True, False])
@pytest.mark.parametrize("name", RUNS)
def test_prompts_beside_pages_of_runs(device, case, name, has_host):
    mask = [first(49, 49), first(20, 49), [i >= 9 for i in range(49)], first(0, 49)]
    Prompt(case, [0, 13, 31, 15], mask).check_runs(device, name, has_host=has_host)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RUNS)
def test_runs_of_blocks_that_no_power_of_two_measures(device, case, name, dtype):
    prompt = Prompt(case, [47, 5], [first(97, 97)] * 2, size=48, dim=20, dtype=dtype)
    prompt.check_runs(device, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_no_power_of_two_measures(device, case, name, dtype):
    mask = [first(97, 97), first(97, 97)]
    Prompt(case, [47, 5], mask, size=48, dim=20, dtype=dtype).check(device, name)
