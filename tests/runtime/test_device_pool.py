from __future__ import annotations

import re

import pytest
import torch

from sparda_compile.errors import DevicePoolFullError
from sparda_compile.runtime import device_pool
from sparda_compile.runtime.device_pool import DevicePool
from sparda_compile.state.layout import TensorSpec

MIB = 1 << 20


def test_limit_that_is_too_small_is_named():
    pool = DevicePool(torch.device("cpu"), 2 * MIB)
    pool.check(2 * MIB, 3, 4096)
    want = (
        "the KV cache of 3 sequences of 4096 tokens needs 2.5 MiB on the device, but device_bytes "
        "allows 2.0 MiB"
    )
    with pytest.raises(DevicePoolFullError, match=re.escape(want)):
        pool.check(2 * MIB + MIB // 2, 3, 4096)


def test_no_limit_allows_any_size():
    DevicePool(torch.device("cpu"), None).check(1 << 60, 1, 1)


@pytest.mark.parametrize(
    ("limit", "whose"),
    [
        (None, "cuda:1 has free 3.5 MiB"),
        (8 * MIB, "cuda:1 has free 3.5 MiB"),
        (3 * MIB, "device_bytes allows 3.0 MiB"),
    ],
)
def test_a_gpu_gives_no_more_than_it_has_free(monkeypatch, limit, whose):
    """Free is what the driver has, and what torch has reserved and given to nobody."""
    sizes = {"mem_get_info": (2 * MIB, 80 * MIB), "memory_reserved": 5 * MIB,
             "memory_allocated": 7 * MIB // 2}  # fmt: skip
    asked = []
    for name, size in sizes.items():
        monkeypatch.setattr(
            torch.cuda, name, lambda device, size=size: asked.append(device) or size
        )
    gpu = torch.device("cuda:1")
    assert device_pool.free_device_bytes(gpu) == 7 * MIB // 2
    pool = DevicePool(gpu, limit)
    pool.check(3 * MIB, 3, 4096)
    with pytest.raises(
        DevicePoolFullError, match=re.escape(f"needs 4.0 MiB on the device, but {whose};")
    ):
        pool.check(4 * MIB, 3, 4096)
    assert set(asked) == {gpu}


def test_allocation_is_counted_and_filled():
    pool = DevicePool(torch.device("cpu"), None)
    table = pool.allocate(TensorSpec((2, 3), torch.int32, fill=-1))
    assert table.tolist() == [[-1] * 3] * 2
    assert pool.allocate(TensorSpec((5,), torch.int64)).tolist() == [0] * 5
    assert pool.num_bytes == 24 + 40
