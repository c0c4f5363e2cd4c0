from __future__ import annotations

import re

import pytest
import torch

from sparda_compile.errors import HostPoolFullError, KVCacheError
from sparda_compile.runtime import host_pool
from sparda_compile.runtime.host_pool import HostPool, free_host_bytes
from sparda_compile.runtime.numa import Placement
from sparda_compile.state.layout import TensorSpec

MIB = 1 << 20


def test_free_bytes_are_those_of_this_machine():
    assert MIB < free_host_bytes() < 1 << 50


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemAvailable: many kB\n"])
def test_free_bytes_without_meminfo_are_the_physical_memory(monkeypatch, tmp_path, text):
    (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr(
        host_pool, "open", lambda *_, **__: (tmp_path / "meminfo").open(), raising=False
    )
    assert free_host_bytes() >= MIB


def test_limit_that_is_too_small_is_named(monkeypatch):
    monkeypatch.setattr(host_pool, "free_host_bytes", lambda: 100 * MIB)
    HostPool(20 * MIB).check(20 * MIB, 3, 4096)
    want = "3 sequences of 4096 tokens needs 21 MiB of CPU memory, but host_bytes allows 20 MiB"
    with pytest.raises(HostPoolFullError, match=re.escape(want)) as error:
        HostPool(20 * MIB).check(21 * MIB, 3, 4096)
    assert isinstance(error.value, KVCacheError)


@pytest.mark.parametrize("limit", [None, 500 * MIB])
def test_machine_that_is_too_small_is_named(monkeypatch, limit):
    monkeypatch.setattr(host_pool, "free_host_bytes", lambda: 100 * MIB)
    HostPool(limit).check(100 * MIB, 1, 64)
    with pytest.raises(HostPoolFullError, match=r"needs 101 MiB .* machine has free 100 MiB"):
        HostPool(limit).check(101 * MIB, 1, 64)


class FakeRegion:
    """Pinned memory of a machine with large pages."""

    def __init__(self, num_bytes, place):
        self.place = place
        self.num_bytes = -(-num_bytes // 4096) * 4096
        self.tensor = torch.arange(num_bytes).to(torch.uint8)


def test_pinned_blocks_are_views_of_regions_that_the_pool_keeps(monkeypatch):
    monkeypatch.setattr(host_pool, "PinnedMemory", FakeRegion)
    place = Placement("near", frozenset({0}))
    pool = HostPool(None, pinned=True, place=place)
    blocks = [pool.allocate(TensorSpec((2, 3), torch.int16, on_host=True)) for _ in range(2)]
    assert [b.shape for b in blocks] == [(2, 3)] * 2
    assert [b.data_ptr() for b in blocks] == [r.tensor.data_ptr() for r in pool._regions]
    assert all(region.place is place for region in pool._regions)
    assert blocks[0].view(torch.uint8).flatten().tolist() == list(range(12))
    assert pool.num_bytes == 2 * 4096
    empty = pool.allocate(TensorSpec((0,), torch.float32, on_host=True))
    assert empty.shape == (0,)
    assert len(pool._regions) == 2


def test_allocation_is_counted_and_empty():
    pool = HostPool(None)
    tensor = pool.allocate(TensorSpec((2, 3), torch.bfloat16, on_host=True))
    assert tensor.dtype == torch.bfloat16
    assert tensor.eq(0).all()
    pool.allocate(TensorSpec((0,), torch.float32, on_host=True))
    assert pool.num_bytes == 12
