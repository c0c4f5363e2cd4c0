"""Constants of a machine, for the cost model. Measured, not from a datasheet.

H200 values: medians measured on one H200 with PCIe Gen5: device copy 4.3 TB/s, 8192^3 bf16 matmul
790 TFLOP/s; of gathers from pinned memory and of matrix products with and without one beside them,
as in benchmarks/results/2026-11-26-h200-kernels.json. H100 values: `sparda calibrate` on one H100,
and the last two from 2026-11-25-h100-kernels.json. CPU values: two cores of a server, best of 15
runs each: a 256 MiB copy, a gather of 32 KiB rows, a 2048^3 fp32 matmul, a small elementwise op,
and, on one core, blocks in `int8` unpacked to fp32; there nothing runs beside anything else.
`LATENCY_US` has its own source.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LATENCY_US", "MACHINES", "SCORES", "Machine", "calibration_file", "machine_for"]


_log = logging.getLogger(__name__)

# What a sparda op takes however few its bytes are, microseconds: phases that wait for each other,
# such as barriers, scans, chains of loads, a second launch. The time of its bytes comes on top. An
# op that is not named takes one launch.
#
# h200: `sparda calibrate` on one H200, November 2026 (batch 1, 128K tokens, 2 KV heads of 128, 96
# blocks, bf16), but for the ops that select or attend, whose kernels are newer: alone in replayed
# CUDA graphs, and `attend_resident` as much less than both kernels as it was before.
# `repair_predicted` of h200 is what is left of a layer that speculates (25.46 us; 128K tokens, 2 KV
# heads, 98% predicted) less one without attention (24.21 - 7.66) and the bytes of the partials: by
# `sparda bench prr`, November 2026. `attend_predicted` took 5.95 us alone, 1.8 of them its bytes.
# h100: `sparda calibrate` on one H100, with the kernels before those.
# The 200 of gloo's collectives are an assumption.
# cpu: the reference ops on one core of a server, best of 40, batch 1, 8192 tokens, 2 KV heads of
# 16, fp32. Attention is not named: there it is arithmetic.
LATENCY_US: Final[Mapping[str, Mapping[str, float]]] = {
    "cpu": {
        "score_blocks": 90.0,
        "select_blocks": 70.0,
        "plan_pages": 330.0,
        "select_pages": 420.0,
        "all_reduce": 200.0,
        "all_gather": 200.0,
    },
    "h100": {
        "score_blocks": 2.56,
        "select_blocks": 8.03,
        "plan_pages": 4.37,
        "select_pages": 11.1,
        "attend_resident": 5.77,
        "attend_missing": 7.51,
        "sparse_attention": 7.51,
    },
    "h200": {
        "score_blocks": 2.76,
        "select_blocks": 6.1,
        "plan_pages": 4.05,
        "select_pages": 8.8,
        "attend_resident": 4.5,
        "attend_missing": 6.2,
        "sparse_attention": 6.2,
        "attend_predicted": 4.2,
        "repair_predicted": 8.5,
    },
}

# What the scores of a selector take beside its bytes, and the rate at which their kernels read
# these: unpacking codes and summing weights take instructions, not bytes. A selector that is not
# named takes `score_blocks` of the above, and the rate of the memory. On one H200, November and
# December 2026, 128K tokens, 2 KV heads of 128, 1 and 16 sequences, in replayed CUDA graphs
# (benchmarks/results/2026-11-30-h200-score-forms.json, 2026-12-01-h200-low-bit-integers.json):
# these two numbers are the line through the two times.
SCORES: Final[Mapping[str, Mapping[str, float]]] = {
    "infllm2": {"latency_us": 4.8, "gbps": 2710.0},
    "lowbit2": {"latency_us": 9.7, "gbps": 2641.0},
    "lowbit4": {"latency_us": 9.2, "gbps": 3305.0},
    "lowbit2_forecast": {"latency_us": 4.6, "gbps": 3538.0},
    "lowbit4_forecast": {"latency_us": 5.1, "gbps": 4120.0},
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the scheduler must know of a machine.

    Attributes:
        name: Name, as in `SpardaConfig.machine`.
        memory_gbps: Device memory bandwidth, 10^9 bytes per second.
        link_gbps: CPU-to-device bandwidth for whole blocks.
        tflops: Matrix multiplication rate, 10^12 per second.
        launch_us: Least time of one kernel, microseconds.
        overlaps: Whether the side streams run beside the compute stream.
        latency_us: Sparda op -> what it takes beside its bytes, microseconds. Constants that were
            written before it was measured have that of an H200.
        kernel_us: What a kernel of the model takes beside its bytes, microseconds: matrix products
            of a decode step in a row, less the time of their bytes.
        copy_share: Share of its rate that the compute stream loses while a copy between CPU and
            device runs beside it, 0.0 to 1.0.
        crowd_share: Share of its rate that an op of ours on the compute stream of a decode step
            loses besides, while a copy or the selection for another layer runs beside it: its
            kernels are small and wait for memory. On an H200 a step of mode `forecast` of one
            sequence, 128K tokens and 2 KV heads took 4 us a layer less where both ran beside the
            model's products instead (benchmarks/results/2026-11-30-h200-chain-places.json).
        unpack_gnps: Rate at which attention unpacks pages of stored runs, 10^9 numbers per second:
            16 sequences with `int8` took 2.74 ms more than with pages of the model's dtype, 32
            layers, 96 blocks, 2 KV heads (benchmarks/results/2026-11-30-h200-small-pages.json).
        peer_gbps: Rate at which a rank sends to others in a collective, 10^9 bytes per second: what
            sums of a decode step reach between two H200s, up to 2 MB
            (benchmarks/results/2026-11-30-h200x2-all-reduce.json).
        scores: Selector -> `latency_us` and `gbps` of its scores in a decode step, see `SCORES`.
    """

    name: str
    memory_gbps: float
    link_gbps: float
    tflops: float
    launch_us: float
    overlaps: bool
    latency_us: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: dict(LATENCY_US["h200"]), hash=False
    )
    kernel_us: float = 3.1
    copy_share: float = 0.15
    crowd_share: float = 0.27
    unpack_gnps: float = 460.0
    peer_gbps: float = 100.0
    scores: Mapping[str, Mapping[str, float]] = dataclasses.field(
        default_factory=lambda: {name: dict(times) for name, times in SCORES.items()}, hash=False
    )

    def pages_us(self, num_bytes: float, unpacked: float) -> float:
        """Return what attention takes for pages, microseconds.

        Args:
            num_bytes: Of the pages.
            unpacked: Numbers among them that are unpacked, see `CacheLayout.unpacked`.
        """
        return max(num_bytes / (self.memory_gbps * 1e3), unpacked / (self.unpack_gnps * 1e3))

    def score_us(self, selector: str, num_bytes: float) -> float:
        """Return what the scores of a selector take in a decode step, microseconds.

        Args:
            selector: Its name, `Selector.timed_as`.
            num_bytes: Of its summary, and of the scores.
        """
        times = self.scores.get(selector, {})
        latency = times.get("latency_us", self.latency_of("score_blocks"))
        return latency + num_bytes / (min(times.get("gbps", math.inf), self.memory_gbps) * 1e3)

    def latency_of(self, op: str, default_us: float | None = None) -> float:
        """Return what a sparda op, such as `select_pages`, takes beside its bytes.

        Args:
            op: Its name.
            default_us: Where the machine does not say; None is one launch.
        """
        return self.latency_us.get(op, self.launch_us if default_us is None else default_us)


MACHINES: Final = {
    "cpu": Machine(
        "cpu",
        13.1,
        5.6,
        0.15,
        2.5,
        overlaps=False,
        latency_us=LATENCY_US["cpu"],
        kernel_us=2.5,
        copy_share=0.0,
        crowd_share=0.0,
        unpack_gnps=0.22,
        peer_gbps=1.0,
        scores={},
    ),
    "h100": Machine(
        "h100",
        3027.0,
        47.9,
        792.0,
        1.2,
        overlaps=True,
        latency_us=LATENCY_US["h100"],
        kernel_us=2.4,
        copy_share=0.11,
    ),
    "h200": Machine("h200", 4300.0, 50.1, 790.0, 2.0, overlaps=True),
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
            nothing was, those of the GPU that the device's name speaks of, `h200` for any other
            GPU, and `cpu` for the CPU.
        device: Where the program runs.

    Raises:
        ConfigError: If the file of measured constants cannot be read.
    """
    if name is not None:
        return MACHINES[name]
    if device.type != "cuda":
        return MACHINES["cpu"]
    device_name = torch.cuda.get_device_name(device)
    path = calibration_file(device_name)
    if not path.is_file():
        known = [name for name in MACHINES if name in device_name.lower()]
        chosen = known[0] if known else "h200"
        _log.info("no calibration of %s; planning with %s. Run `sparda calibrate`.", device, chosen)
        return MACHINES[chosen]
    try:
        return Machine(**json.loads(path.read_text(encoding="utf-8"))["machine"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} does not hold the constants of a machine ({error}); run `sparda calibrate` "
            "again, or remove it."
        ) from error
