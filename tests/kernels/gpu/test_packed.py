"""Kernels of formats that round, against the plain ones: what is stored is compared as bytes."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.formats.int8 import Int8Format
from sparda_compile.kernels.gpu import packed as kernels
from sparda_compile.kernels.gpu import stage
from sparda_compile.kernels.gpu.prefill import load_prefix
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.kernels.prefill_attention import past_keys_values
from sparda_compile.registry import KV_FORMATS
from sparda_compile.runtime import packed
from sparda_compile.runtime.staging import stage_blocks

NAMES = ("int8", "fp8", "int4")
# Infinity less infinity, and what that becomes as an integer that nobody reads.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
SIZES = [
    *((16, 60, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    (48, 96, torch.bfloat16), (64, 128, torch.bfloat16),
]  # fmt: skip


def hard(*shape, dtype, seed=0):
    """Return blocks with outliers, constant lines, tiny numbers, zeros, NaN and infinity."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 1000
    x[..., 1, :] = 0.25
    x[..., 5] = -2.5
    x[..., 7] *= 1e-6
    x[..., 2, :] *= 1e-7
    x[..., 9] = 0.0
    x = x.to(dtype)
    x[..., 4, 11], x[..., 6, 12] = float("nan"), float("-inf")
    return x


def same(got, want):
    """Whether bytes are the same, but for those of NaN, of which there are many."""
    got = got.cpu()
    if got.dtype == torch.uint8:
        return torch.equal(got, want)
    nan = want.isnan()
    return torch.equal(got.isnan(), nan) and torch.equal(
        got[~nan].view(torch.uint8), want[~nan].view(torch.uint8)
    )


class Memory:
    """Runs of blocks that the device reads and writes by address."""

    def __init__(self, runs, device):
        self.runs = torch.empty(runs.shape, dtype=runs.dtype, pin_memory=device == "cuda")
        self.runs.copy_(runs)
        pair = torch.arange(runs.shape[0] * runs.shape[1]).view(runs.shape[:2])
        self.at = (self.runs.data_ptr() + pair * self.runs[0, 0].nbytes).to(device)


def finish(device):
    if device == "cuda":
        torch.cuda.synchronize()


def runs_as_values(found, runs, size, dim, dtype):
    """Return codes, as bytes, and scales, as numbers: NaN has many forms."""
    codes = 2 * size * dim * found.code_bits // 8
    scales = found.num_scales * (size + dim) * dtype.itemsize
    return runs[..., :codes], runs[..., codes : codes + scales].contiguous().view(dtype)


def check_runs(name, got, want, size, dim, dtype):
    parts = [runs_as_values(KV_FORMATS[name], each, size, dim, dtype) for each in (got, want)]
    assert all(map(same, *parts))


@pytest.mark.parametrize(("size", "dim", "dtype"), [*SIZES, (128, 256, torch.bfloat16)])
@pytest.mark.parametrize("name", NAMES)
def test_gather_unpacks_the_listed_blocks(device, name, size, dim, dtype):
    found = KV_FORMATS[name]
    blocks = hard(2, 1, 3, 2, size, dim, dtype=dtype)
    memory = Memory(found.pack(blocks), device)
    pages = torch.full((2, 1, 4, 2, size, dim), 7.0, dtype=dtype)
    ids = torch.tensor([[[2, 0, -1]], [[1, -1, -1]]], dtype=torch.int32)
    to = torch.tensor([[[0, 3, -1]], [[1, -1, -1]]], dtype=torch.int32)
    want = pages.clone()
    want[0, 0, [0, 3]] = found.unpack(memory.runs[0, 0, [2, 0]], size, dim, dtype)
    want[1, 0, 1] = found.unpack(memory.runs[1, 0, 1], size, dim, dtype)
    got = pages.to(device)
    kernels.gather_packed(ids.to(device), to.to(device), memory.at, got, name, 2)
    finish(device)
    assert same(got, want)


@pytest.mark.parametrize("has_host", [True, False])
@pytest.mark.parametrize(("size", "dim", "dtype"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_full_tail_is_stored_and_rounded(device, name, size, dim, dtype, has_host):
    """Of three sequences the second has not filled its block, and a page of the third is absent."""
    pages = hard(3, 1, 3, 2, size, dim, dtype=dtype)
    lengths = torch.tensor([2 * size - 1, size - 2, size - 1], dtype=torch.int32)
    tail = torch.tensor([[2], [1], [-1]], dtype=torch.int32)
    shape = (3, 1, 2, *KV_FORMATS[name].stored(size, dim, dtype)[0])
    host = torch.full(shape, 9, dtype=torch.uint8)
    want_host = host.clone() if has_host else torch.empty(0)
    want, counters = pages.clone(), torch.zeros(6, dtype=torch.int64)
    packed.store_tail(tail, lengths, want, want_host, counters, name)
    memory, got = Memory(host, device), pages.clone().to(device)
    count = torch.tensor([5], device=device)
    where = memory.at if has_host else torch.empty(0, device=device)
    kernels.store_tail(tail.to(device), lengths.to(device), got, where, count, name)
    finish(device)
    assert same(got, want)
    assert not same(pages, want)
    assert int(count) - 5 == counters.sum() == has_host
    assert torch.equal(memory.runs[1:], host[1:])
    if has_host:
        check_runs(name, memory.runs[0, :, 1], want_host[0, :, 1], size, dim, dtype)
        again = KV_FORMATS[name].unpack(memory.runs[0, 0, 1], size, dim, dtype)
        assert same(got[0, 0, 2], again)


class Prompt:
    """New tokens behind others, and tables; the first block that gets tokens has a page."""

    def __init__(self, lengths, mask, *, size=16, dim=24, dtype=torch.float16, groups=2):
        self.lengths, self.mask = torch.tensor(lengths, dtype=torch.int32), torch.tensor(mask)
        self.size, self.dim, self.dtype = size, dim, dtype
        batch, num_tokens = self.mask.shape
        new = hard(2, batch, num_tokens, max(groups, 8), dim, dtype=dtype)[..., :groups, :]
        self.k, self.v = new[0].transpose(1, 2), new[1].transpose(1, 2).contiguous()
        self.pages = hard(batch, groups, 4, 2, size, dim, dtype=dtype, seed=1)
        self.table = torch.full((batch, groups, 6), -1, dtype=torch.int32)
        for row, length in enumerate(lengths):
            for group in range(groups):
                self.table[row, group, length // size] = 2 - group
                self.table[row, group, (length // size + 2) % 6] = 3

    def check(self, device, name, *, has_host=True):
        tokens = number_tokens(self.mask, self.lengths)
        total_B = tokens[2]
        # As `extend_kv` leaves it: the first block's page has its new tokens, too.
        for row, length in enumerate(self.lengths.tolist()):
            columns = torch.where(self.mask[row])[0]
            for place, column in enumerate(columns.tolist()):
                if (length + place) // self.size == length // self.size:
                    for group in range(self.k.shape[1]):
                        page = self.table[row, group, length // self.size]
                        at = self.pages[row, group, page, :, (length + place) % self.size]
                        at[0], at[1] = self.k[row, group, column], self.v[row, group, column]
        run = KV_FORMATS[name].stored(self.size, self.dim, self.dtype)[0]
        host = torch.full((*self.table.shape, *run), 9, dtype=torch.uint8)
        want_host = host.clone() if has_host else torch.empty(0)
        want, counters = self.pages.clone(), torch.zeros(6, dtype=torch.int64)
        packed.store_prefix(
            self.k, self.v, tokens, self.lengths, self.table, want, want_host, counters, name
        )
        memory, got = Memory(host, device), self.pages.clone().to(device)
        count = torch.zeros(1, dtype=torch.int64, device=device)
        where = memory.at if has_host else torch.empty(0, device=device)
        new = [t.to(device) for t in (self.k, self.v, *tokens, self.lengths, self.table)]
        kernels.store_prefix(*new[:2], new[2:5], *new[5:], got, where, count, name, 5)
        finish(device)
        assert same(got, want)
        filled = (total_B // self.size - self.lengths // self.size).sum() * self.k.shape[1]
        assert filled > 0
        assert int(count) == counters.sum() == (filled if has_host else 0)
        if has_host:
            written = (want_host != 9).any(-1)
            assert int(written.sum()) == filled
            assert torch.equal(memory.runs[~written], host[~written])
            sizes = (self.size, self.dim, self.dtype)
            check_runs(name, memory.runs[written], want_host[written], *sizes)


def first(count, width):
    return [i < count for i in range(width)]


@pytest.mark.parametrize("has_host", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_several_blocks_and_second_turns(device, name, has_host):
    """Ragged, with padding on both sides, one that fills nothing and one with no token."""
    mask = [first(49, 49), first(20, 49), first(49, 49)[:9] + first(40, 40), first(0, 49)]
    mask[2][:9] = [False] * 9
    Prompt([0, 13, 31, 15], mask).check(device, name, has_host=has_host)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_no_power_of_two_measures(device, name, dtype):
    prompt = Prompt([47, 5], [first(97, 97), first(97, 97)], size=48, dim=20, dtype=dtype, groups=1)
    prompt.check(device, name)


class Past:
    """Blocks on pages and in CPU memory, the first ones of each sequence."""

    def __init__(self, name, dtype=torch.bfloat16):
        size, dim, num_blocks = 16, 32, 5
        found = KV_FORMATS[name]
        blocks = hard(2, 2, num_blocks, 2, size, dim, dtype=dtype)
        self.host = found.pack(blocks)
        self.pages = found.unpack(self.host, size, dim, dtype)[:, :, [1, 4, 0]].contiguous()
        self.table = torch.full((2, 2, num_blocks), -1, dtype=torch.int32)
        self.table[:, 0, 1], self.table[:, 1, 4], self.table[0, :, 0] = 0, 1, 2


@pytest.mark.parametrize("name", NAMES)
def test_the_past_is_unpacked_in_order(device, name):
    past = Past(name)
    want = past_keys_values(past.pages, past.host, past.table, 5, name)
    memory = Memory(past.host, device)
    got = load_prefix(past.pages.to(device), memory.at, past.table.to(device), 5, name)
    finish(device)
    for half, wanted in zip(got.unbind(3), want, strict=True):
        assert same(half.flatten(2, 3), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_prompt_reads_of_the_past_is_unpacked(device, name, monkeypatch):
    past, lengths = Past(name), torch.tensor([80, 50], dtype=torch.int32)
    ids = torch.tensor([[0, 2, 4], [1, 3, -1]], dtype=torch.int32)
    ids = ids.expand(2, 2, 2, 3).contiguous()
    where = (past.pages, past.host, past.table)
    want, want_slots = stage_blocks(ids, lengths, *where, 80, kv_format=name)
    memory = Memory(past.host, device)
    got, slots = torch.full_like(want, 3.0).to(device), torch.empty_like(want_slots).to(device)
    on_device = (past.pages.to(device), memory.at, past.table.to(device))
    num_room = want.shape[2] - 2
    stage.stage(ids.to(device), lengths.to(device), on_device, got, slots, num_room, name)
    finish(device)
    assert torch.equal(slots.cpu(), want_slots)
    row, head, block = torch.where(want_slots >= 0)
    assert len(row) > 8
    place = want_slots[row, head, block].long()
    assert same(got.cpu()[row, head, place], want[row, head, place])


def test_a_format_without_kernels_is_refused(monkeypatch):
    class Plain(Int8Format):
        name = "plain"
        kernels = None

    KV_FORMATS.add(Plain())
    try:
        pages, ids = torch.zeros(1, 1, 2, 2, 16, 8), torch.zeros(1, 1, 1, dtype=torch.int32)
        with pytest.raises(UnsupportedInputError, match="kv_format='plain' has no kernels"):
            kernels.gather_packed(ids, ids, torch.zeros(1, 1).long(), pages, "plain")
    finally:
        KV_FORMATS.remove("plain")
