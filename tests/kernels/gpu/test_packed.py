"""Kernels that unpack blocks against the plain ones; numbers are compared as bytes."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels.gpu import packed, stage
from sparda_compile.kernels.gpu.prefill import load_prefix
from sparda_compile.kernels.past import past_keys_values
from sparda_compile.registry import KV_FORMATS
from sparda_compile.runtime.staging import stage_blocks

# A line that is NaN has infinity as its unit in `fp8`, and 0 times that is NaN.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

NAMES = ("int8", "fp8", "int4")
SIZES = [
    *((16, 60, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    (48, 96, torch.bfloat16), (64, 128, torch.bfloat16), (128, 256, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(("size", "dim", "dtype"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_gather_unpacks_the_listed_blocks_and_nothing_else(device, case, name, size, dim, dtype):
    found = KV_FORMATS[name]
    blocks = case.blocks(2, 1, 3, 2, size, dim, dtype=dtype)
    runs, at = case.memory(found.pack(blocks), device)
    pages = torch.full((2, 1, 4, 2, size, dim), 7.0, dtype=dtype)
    ids = torch.tensor([[[2, 0, -1]], [[1, -1, -1]]], dtype=torch.int32)
    to = torch.tensor([[[0, 3, -1]], [[1, -1, -1]]], dtype=torch.int32)
    want = pages.clone()
    want[0, 0, [0, 3]] = found.unpack(runs[0, 0, [2, 0]], size, dim, dtype)
    want[1, 0, 1] = found.unpack(runs[1, 0, 1], size, dim, dtype)
    got = pages.clone().to(device)
    packed.gather_packed(ids.to(device), to.to(device), at, got, name, num_programs=2)
    case.wait(device)
    assert case.same(got, want)


@pytest.mark.parametrize("num_programs", [1, 3, 9])
def test_gather_with_any_number_of_programs(device, case, num_programs):
    found = KV_FORMATS["int4"]
    blocks = case.blocks(3, 2, 4, 2, 16, 16, dtype=torch.float16)
    runs, at = case.memory(found.pack(blocks), device)
    count = torch.tensor([[0, 4], [1, 2], [3, 0]])[..., None]
    ids = torch.arange(4).expand(3, 2, 4).masked_fill(torch.arange(4) >= count, -1).int()
    pages = torch.zeros(3, 2, 4, 2, 16, 16, dtype=torch.float16)
    there = (ids >= 0)[..., None, None, None]
    want = torch.where(there, found.unpack(runs, 16, 16, pages.dtype), pages)
    got = pages.to(device)
    packed.gather_packed(ids.to(device), ids.to(device), at, got, "int4", num_programs=num_programs)
    case.wait(device)
    assert case.same(got, want)


class Past:
    """Blocks on pages and in CPU memory, the first ones of each sequence."""

    def __init__(self, case, device, name):
        found = KV_FORMATS[name]
        blocks = case.blocks(2, 2, 5, 2, 16, 32, dtype=torch.bfloat16)
        self.host, at = case.memory(found.pack(blocks), device)
        pages = found.unpack(self.host, 16, 32, torch.bfloat16)
        self.pages = pages[:, :, [1, 4, 0]].contiguous()
        self.table = torch.full((2, 2, 5), -1, dtype=torch.int32)
        self.table[:, 0, 1], self.table[:, 1, 4], self.table[0, :, 0] = 0, 1, 2
        self.plain = (self.pages, self.host, self.table)
        self.on_device = (self.pages.to(device), at, self.table.to(device))


@pytest.mark.parametrize("name", NAMES)
def test_the_past_is_unpacked_in_order(device, case, name):
    past = Past(case, device, name)
    want = past_keys_values(*past.plain, torch.tensor([80, 80]), name)
    got = load_prefix(*past.on_device, 5, name)
    case.wait(device)
    for half, wanted in zip(got.unbind(3), want, strict=True):
        assert case.same(half.flatten(2, 3), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_prompt_reads_of_the_past_is_unpacked(device, case, name):
    past, lengths = Past(case, device, name), torch.tensor([80, 50], dtype=torch.int32)
    ids = torch.tensor([[0, 2, 4], [1, 3, -1]], dtype=torch.int32)
    ids = ids.expand(2, 2, 2, 3).contiguous()
    want, want_slots = stage_blocks(ids, lengths, *past.plain, 80, kv_format=name)
    got, slots = torch.full_like(want, 3.0).to(device), torch.empty_like(want_slots).to(device)
    on_device, room = (ids.to(device), lengths.to(device), past.on_device), want.shape[2] - 2
    stage.stage(*on_device, got, slots, room, name)
    case.wait(device)
    assert torch.equal(slots.cpu(), want_slots)
    row, head, block = torch.where(want_slots >= 0)
    assert len(row) > 8
    place = want_slots[row, head, block].long()
    assert case.same(got.cpu()[row, head, place], want[row, head, place])


@pytest.mark.parametrize("name", NAMES)
def test_the_past_on_pages_of_runs_is_unpacked(device, case, name):
    """In order, and what a prompt reads of it; the same numbers as of other pages."""
    past, lengths = Past(case, device, name), torch.tensor([80, 50], dtype=torch.int32)
    runs = past.host[:, :, [1, 4, 0]].contiguous().to(device)
    tail = torch.zeros(2, 2, 2, 2, 16, 32, dtype=torch.bfloat16, device=device)
    at, table = past.on_device[1:]
    want = past_keys_values(*past.plain, torch.tensor([80, 80]), name)
    got = load_prefix(runs, at, table, 5, name, (), tail)
    case.wait(device)
    for half, wanted in zip(got.unbind(3), want, strict=True):
        assert case.same(half.flatten(2, 3), wanted)

    ids = torch.tensor([[0, 2, 4], [1, 3, -1]], dtype=torch.int32)
    ids = ids.expand(2, 2, 2, 3).contiguous()
    staged, slots = stage_blocks(ids, lengths, *past.plain, 80, kv_format=name)
    mine, mine_slots = torch.zeros_like(staged).to(device), torch.empty_like(slots).to(device)
    given = (ids.to(device), lengths.to(device), (runs, at, table), mine, mine_slots)
    stage.stage(*given, staged.shape[2] - 2, name, (), tail)
    case.wait(device)
    assert torch.equal(mine_slots.cpu(), slots)
    row, head, block = torch.where(slots >= 0)
    place = slots[row, head, block].long()
    assert case.same(mine.cpu()[row, head, place], staged[row, head, place])
    assert {int(past.table[r, h, b]) < 0 for r, h, b in zip(row, head, block, strict=True)} == {
        True, False
    }  # fmt: skip
