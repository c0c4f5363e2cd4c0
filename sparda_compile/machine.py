"""Constants of a machine, for the cost model. Measured, not from a datasheet.

H200 values: medians measured on one H200 with PCIe Gen5 (device copy 4.3 TB/s, gathers of 32 KiB
blocks from pinned memory 45 GB/s, 8192^3 bf16 matmul 790 TFLOP/s). CPU values: two cores of a
server, best of 15 runs each: a 256 MiB copy, a gather of 32 KiB rows, a 2048^3 fp32 matmul and a
small elementwise op; there nothing runs beside anything else.
"""

from __future__ import annotations

import dataclasses
from typing import Final

__all__ = ["MACHINES", "Machine"]


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
