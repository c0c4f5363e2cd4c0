"""Pinned CPU memory of exactly the size asked for.

torch's pinned allocator rounds every request up to a power of two: 4.1 GiB takes 8. Here memory is
mapped, filled so that its pages exist, and then registered with the driver, page by page:

    mmap(size) -> zero near the GPU -> cudaHostRegister -> ... -> cudaHostUnregister -> munmap

The GPU reads and writes registered memory at the address that the CPU uses, where the driver
says so (`CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM`, CUDA driver API).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Final

import torch

from sparda_compile.errors import HostPoolFullError, UnsupportedInputError
from sparda_compile.runtime.numa import ANYWHERE, Placement

__all__ = ["PinnedMemory", "check_host_access"]

_CAN_USE_HOST_POINTER: Final = 91
_MIB: Final = 1 << 20


def check_host_access(device: torch.device) -> None:
    """Raise UnsupportedInputError if the GPU cannot read CPU memory at the CPU's addresses."""
    answer = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        status = driver.cuDeviceGetAttribute(
            ctypes.byref(answer), _CAN_USE_HOST_POINTER, device.index or 0
        )
    except (OSError, AttributeError) as error:
        raise UnsupportedInputError(
            f"the CUDA driver cannot be asked what {device} can do ({error}); offload needs a "
            "Linux driver with libcuda.so.1. Use offload='never' to keep the KV cache on the GPU."
        ) from error
    if status != 0 or not answer.value:
        raise UnsupportedInputError(
            f"{device} cannot read registered CPU memory at the CPU's addresses (driver status "
            f"{status}, attribute {answer.value}), which offload needs. Use offload='never' to "
            "keep the KV cache on the GPU."
        )


class PinnedMemory:
    """One run of pinned memory; given back when the object goes.

    Args:
        num_bytes: Size, rounded up to the machine's page size and no further.
        place: Where it is to be.

    Attributes:
        num_bytes: Size that was taken.
        tensor: [num_bytes asked for] uint8, all zero; must not outlive the object.

    Raises:
        HostPoolFullError: If the machine or the driver refuses.
    """

    def __init__(self, num_bytes: int, place: Placement = ANYWHERE) -> None:
        self._address = 0
        self.num_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._map = mmap.mmap(-1, self.num_bytes, flags=flags)
        except OSError as error:
            raise HostPoolFullError(
                f"the machine refused {self.num_bytes / _MIB:.0f} MiB of CPU memory ({error}); "
                "lower max_tokens or the batch size."
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        address = whole.data_ptr()
        if place.cpus:
            place.zero(address, self.num_bytes)
        else:
            whole.zero_()
        status = int(torch.cuda.cudart().cudaHostRegister(address, self.num_bytes, 0))
        if status != 0:
            raise HostPoolFullError(
                f"the CUDA driver refused to pin {self.num_bytes / _MIB:.0f} MiB of CPU memory "
                f"(cudaHostRegister: error {status}); lower max_tokens or the batch size, or raise "
                "the limit on locked memory (ulimit -l)."
            )
        self._address = address
        self.tensor = whole[:num_bytes]

    def close(self) -> None:
        """Unpin; the GPU must not touch the memory from here on."""
        if self._address:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self._address)
            self._address = 0

    def __del__(self) -> None:
        """Unpin when nobody holds the object any more; at exit the driver does it."""
        if not sys.is_finalizing():
            self.close()
