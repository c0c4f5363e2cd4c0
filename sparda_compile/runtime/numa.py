"""CPU memory near a GPU, where the machine says which NUMA node that is on.

Linux gives a page to the node of the CPU that touches it first. So memory is filled by threads that
are bound to the CPUs of the GPU's node:

    GPU -> PCI address               the CUDA driver
    PCI address -> node              /sys/bus/pci/devices/<address>/numa_node, -1 if not known
    node -> CPUs                     /sys/devices/system/node/node<n>/cpulist

Of these CPUs those count that the process may run on. If there are none, or the machine does not
say, memory is where the process runs, as it would be without this; the reason is kept and logged. A
memory policy of the process, as `numactl --membind` sets it, goes before the CPU that touches.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

__all__ = ["ANYWHERE", "Placement", "placement_near"]

_log = logging.getLogger(__name__)

# Several, since one CPU clears pages more slowly than memory takes them; how many pay was not
# measured.
_MOST_THREADS: Final = 8
_ADDRESS_BYTES: Final = 32


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where CPU memory comes to be.

    Attributes:
        sentence: Where that is, and why; empty if nobody asked.
        cpus: That touch it first; none for wherever the process runs.
    """

    sentence: str = ""
    cpus: frozenset[int] = frozenset()

    def zero(self, address: int, num_bytes: int) -> None:
        """Fill memory with zeros, by threads that are bound to the CPUs.

        Args:
            address: Of memory that nobody has touched yet.
            num_bytes: Its size.
        """
        threads = min(len(self.cpus), _MOST_THREADS)
        pages = -(-num_bytes // mmap.PAGESIZE)
        share = -(-pages // threads) * mmap.PAGESIZE

        def fill(begin: int) -> None:
            ctypes.memset(address + begin, 0, min(share, num_bytes - begin))

        bound = (0, self.cpus)  # 0 is the thread that asks
        with ThreadPoolExecutor(threads, "sparda-numa", os.sched_setaffinity, bound) as pool:
            for done in [pool.submit(fill, begin) for begin in range(0, num_bytes, share)]:
                done.result()


ANYWHERE: Final = Placement()
"""Memory that no GPU reads."""


def placement_near(device: torch.device, system: Path = Path("/sys")) -> Placement:
    """Return where memory is near a CUDA device.

    Args:
        device: The device.
        system: Where Linux says what the machine is made of.
    """
    found = _near(device, system)
    _log.info("pinned CPU memory is %s", found.sentence)
    return found


def _near(device: torch.device, system: Path) -> Placement:
    address = _pci_address(device)
    if address is None:
        return _elsewhere(f"the CUDA driver does not say where {device} is")
    node = _read(system / "bus/pci/devices" / address / "numa_node")
    if not node.isdecimal():  # -1 where there are no nodes
        return _elsewhere(f"the machine does not say which NUMA node {device} ({address}) is on")
    there = _cpus(_read(system / f"devices/system/node/node{node}/cpulist"))
    usable = there & os.sched_getaffinity(0)
    if not usable:
        return _elsewhere(
            f"the process may run on no CPU of NUMA node {node}, which {device} ({address}) is on"
        )
    return Placement(
        f"near {device} ({address}): on NUMA node {node}, touched by {len(usable)} CPUs", usable
    )


def _elsewhere(reason: str) -> Placement:
    return Placement(f"where the process runs: {reason}")


def _pci_address(device: torch.device) -> str | None:
    """Return a device's PCI address as Linux writes it, `0000:1b:00.0`; None if it is not known."""
    text = ctypes.create_string_buffer(_ADDRESS_BYTES)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        status = driver.cuDeviceGetPCIBusId(text, _ADDRESS_BYTES, device.index or 0)
    except (OSError, AttributeError):
        return None
    return text.value.decode("ascii").lower() if status == 0 else None


def _read(path: Path) -> str:
    """Return the text of a file of the system; nothing if it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _cpus(text: str) -> frozenset[int]:
    """Return the CPUs of a list as Linux writes it, `0-3,8`."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
