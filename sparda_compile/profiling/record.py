"""Run something under torch's profiler and return what the GPU did meanwhile.

The profiler leaves its hooks in the driver when it stops, so what is launched later in the process
takes longer: whoever times something else does that before.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["record_events"]


def record_events(call: Callable[[], object], keep: Path | None = None) -> list[Mapping[str, Any]]:
    """Return the events of a Chrome trace of the CUDA work of a call.

    Args:
        call: What to run; the device is waited for behind it.
        keep: Where to keep the trace; None keeps none.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))[
            "traceEvents"
        ]
    return events
