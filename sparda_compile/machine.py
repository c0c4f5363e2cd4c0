"""Constants of a machine, for the cost model. Measured, not from a datasheet.

H200 values: medians measured on one H200 with PCIe Gen5 (device copy 4.3 TB/s, gathers of 32 KiB
blocks from pinned memory 45 GB/s, 8192^3 bf16 matmul 790 TFLOP/s). CPU values: two cores of a
server, best of 15 runs each: a 256 MiB copy, a gather of 32 KiB rows, a 2048^3 fp32 matmul and a
small elementwise op; there nothing runs beside anything else.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from pathlib import Path
from typing import Final

import torch

from sparda_compile.errors import ConfigError

__all__ = ["MACHINES", "Machine", "calibration_file", "machine_for"]


_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the scheduler must know of a machine.

    Attributes:
        name: Name, as in `SpardaConfig.machine`.
        memory_gbps: Device memory bandwidth, 10^9 bytes per second.
        link_gbps: CPU-to-device bandwidth for whole blocks.
        tflops: Matrix multiplication rate, 10^12 per second.
        launch_us: Least time of one kernel, microseconds.
        overlaps: Whether the copy stream runs beside the compute stream.
    """

    name: str
    memory_gbps: float
    link_gbps: float
    tflops: float
    launch_us: float
    overlaps: bool


MACHINES: Final = {
    "cpu": Machine("cpu", 13.1, 5.6, 0.15, 2.5, overlaps=False),
    "h200": Machine("h200", 4300.0, 45.0, 790.0, 2.0, overlaps=True),
}


def calibration_file(device_name: str) -> Path:
    """Return where the measured constants of a device are kept, one file per device."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return base / "sparda_compile" / f"machine-{name}.json"


def machine_for(name: str | None, device: torch.device) -> Machine:
    """Return the constants to plan with.

    Args:
        name: `SpardaConfig.machine`; None takes what was measured on the device, and where
            nothing was, `h200` for a GPU and `cpu` for the CPU.
        device: Where the program runs.

    Raises:
        ConfigError: If the file of measured constants cannot be read.
    """
    if name is not None:
        return MACHINES[name]
    if device.type != "cuda":
        return MACHINES["cpu"]
    path = calibration_file(torch.cuda.get_device_name(device))
    if not path.is_file():
        _log.info("no calibration of %s; planning with h200. Run `sparda calibrate`.", device)
        return MACHINES["h200"]
    try:
        return Machine(**json.loads(path.read_text(encoding="utf-8"))["machine"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} does not hold the constants of a machine ({error}); run `sparda calibrate` "
            "again, or remove it."
        ) from error
