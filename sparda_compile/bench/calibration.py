"""Constants of this machine for the scheduler's cost model, measured in a minute.

memory_gbps   a copy of 4 GiB on the device, bytes read and written
link_gbps     a gather of 32 KiB blocks from pinned memory, with the number of programs in use
tflops        an 8192^3 matrix multiplication in bf16
launch_us     one of many tiny kernels in a CUDA graph
latency_us    ops of a decode step at batch 1 in a CUDA graph, less the time of their bytes
kernel_us     matrix products of a decode step in a CUDA graph, less the time of their bytes
copy_share    how much longer these take beside a gather, over the time of the gather
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.bench.timing import graph_us, matmul_tflops
from sparda_compile.environment import write_result
from sparda_compile.passes.machine import Machine, calibration_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["measure_machine", "write_machine"]

_TINY_KERNELS: Final = 256


def measure_machine(say: Callable[[str], None]) -> Machine:
    """Return the constants of the current CUDA device; `say` is told what is being measured."""
    from sparda_compile.bench.interference import bench_interference, machine_constants
    from sparda_compile.bench.kernels import bench_copy, bench_gather, bench_latencies

    device = torch.device("cuda")
    say("device copy")
    memory = bench_copy(device)
    say("gather from pinned memory")
    link = bench_gather(device)
    say("matrix multiplication")
    tflops = matmul_tflops(device)
    say("tiny kernels")
    launch_us = _launch_us(device)
    say("ops of a decode step")
    latency_us = bench_latencies(device, float(memory["gbps"]))
    say("matrix products beside a copy")
    beside = bench_interference(device, programs=(int(link["programs"]),))
    kernel_us, copy_share = machine_constants(beside, float(memory["gbps"]))
    return Machine(
        name=torch.cuda.get_device_name(),
        memory_gbps=float(memory["gbps"]),
        link_gbps=float(link["by_programs"][link["programs"]]["gbps"]),
        tflops=tflops,
        launch_us=launch_us,
        overlaps=True,
        latency_us=latency_us,
        kernel_us=kernel_us,
        copy_share=copy_share,
    )


def write_machine(machine: Machine, commit: str | None = None) -> Path:
    """Write constants to where `machine_for` finds them on this device; returns the file."""
    path = calibration_file(torch.cuda.get_device_name())
    write_result(path, {"machine": dataclasses.asdict(machine)}, commit)
    return path


def _launch_us(device: torch.device) -> float:
    value = torch.zeros(1, device=device)
    return round(graph_us([partial(value.add_, 1.0)] * _TINY_KERNELS).median, 3)
