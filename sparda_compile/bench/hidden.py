"""How much of a call's copies between CPU and GPU is hidden, as a profiler's trace shows it.

    compute   [layer 1 ........]      [layer 2 ..............]
    copy             [fetch .............]   [store ...]
                     ==========       ==     ===========         hidden

A copy is hidden while a kernel of another stream runs that copies nothing itself. The device is
busy while anything runs on it, copies too; it is seen from the first piece of its work to the end
of the last.
"""

from __future__ import annotations

import bisect
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import sparda_compile.ops  # noqa: F401 - fills the table of instructions
from sparda_compile.errors import BackendUnavailableError
from sparda_compile.isa.table import INSTRUCTIONS, Work
from sparda_compile.profiling.kernel_trace import read_kernels
from sparda_compile.profiling.record import record_events
from sparda_compile.profiling.replay import merged_spans

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    import torch

    from sparda_compile.profiling.kernel_trace import Kernel

    Span = tuple[float, float]

__all__ = ["can_profile", "copy_kernels", "hidden_copies", "profile_copies"]

_COPIES: Final = frozenset({Work.TO_DEVICE, Work.TO_STAGING, Work.TO_HOST})
# What the profiler calls a copy by the driver.
_MEMCPY: Final = "Memcpy"


def can_profile(device: torch.device) -> bool:
    """Return whether there is a trace of a device's work: of a CUDA device alone."""
    return device.type == "cuda"


def copy_kernels() -> frozenset[str]:
    """Return the names of the kernels by which instructions copy blocks, in prefill and decode."""
    copying = [it for it in INSTRUCTIONS.values() if it.work in _COPIES]
    return frozenset(name for it in copying for name in (*it.kernels, *it.prompt_copies))


def profile_copies(call: Callable[[], object]) -> dict[str, Any]:
    """Run a warm call on the CUDA device under torch's profiler; see `hidden_copies`.

    Later launches of the process take longer, so nothing may be timed behind it.

    Raises:
        BackendUnavailableError: If the profiler saw nothing of the device.
    """
    kernels = read_kernels(record_events(call))
    if not kernels:
        raise BackendUnavailableError(
            "torch's profiler saw no kernel of the call. It needs CUPTI, which comes with CUDA "
            "builds of torch, and the right to use it: no other profiler may be attached."
        )
    return hidden_copies(kernels, copy_kernels())


def hidden_copies(kernels: Sequence[Kernel], copies: Collection[str]) -> dict[str, Any]:
    """Return what share of the time of copies is hidden.

    Args:
        kernels: All work of the device, at least one piece.
        copies: Names of those that copy blocks.

    Returns:
        `copies` has, for each name that is there, the sum of its times in `us`, the share of it
        that is `hidden`, and how many `launches`; `hidden_share` is that of all of them, None
        without any. `gpu_busy` is the share of the time in which the device does something, and
        `longest_idle_us` the longest time in which it does nothing.
    """
    covers: dict[int, _Cover] = {}
    rows: dict[str, list[Span]] = {}
    for kernel in kernels:
        if kernel.name not in copies:
            continue
        if kernel.stream not in covers:
            others = (
                (other.start_us, other.end_us)
                for other in kernels
                if other.stream != kernel.stream
                and other.name not in copies
                and not other.name.startswith(_MEMCPY)
            )
            covers[kernel.stream] = _Cover(others)
        length = kernel.end_us - kernel.start_us
        under = covers[kernel.stream].within(kernel.start_us, kernel.end_us)
        rows.setdefault(kernel.name, []).append((length, under))
    busy = _Cover((kernel.start_us, kernel.end_us) for kernel in kernels)
    gaps = [start - end for start, end in zip(busy.starts[1:], busy.ends, strict=False)]
    return {
        "copies": {
            name: {
                "us": round(sum(length for length, _ in spans), 1),
                "hidden": _share(spans),
                "launches": len(spans),
            }
            for name, spans in sorted(rows.items())
        },
        "hidden_share": _share([span for spans in rows.values() for span in spans]),
        "gpu_busy": _share([(busy.ends[-1] - busy.starts[0], busy.total)]),
        "longest_idle_us": round(max(gaps, default=0.0), 1),
    }


def _share(spans: Sequence[Span]) -> float | None:
    """Return the sum of the second numbers over that of the first, None if that is zero."""
    whole, part = (sum(each) for each in zip(*spans, strict=True)) if spans else (0.0, 0.0)
    return round(part / whole, 4) if whole else None


class _Cover:
    """The time that is in any of some spans.

    Args:
        spans: Start and end of each.

    Attributes:
        starts: Of the stretches that they make together, ascending.
        ends: Theirs.
        total: The sum of their lengths.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        stretches = merged_spans(spans)
        self.starts = [start for start, _ in stretches]
        self.ends = [end for _, end in stretches]
        self._before = [*accumulate((end - start for start, end in stretches), initial=0.0)]
        self.total = self._before[-1]

    def within(self, start: float, end: float) -> float:
        """Return how much of a span is covered."""
        return self._until(end) - self._until(start)

    def _until(self, time: float) -> float:
        place = bisect.bisect_right(self.starts, time)
        if place == 0:
            return 0.0
        return self._before[place - 1] + min(time, self.ends[place - 1]) - self.starts[place - 1]
