"""The processes that measure a model together: torchrun starts one for each rank."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["rank_device", "rank_group"]


def rank_device(num_ranks: int, shape: str) -> torch.device:
    """Return the device of this rank.

    Args:
        num_ranks: Processes of this host.
        shape: A key of `SHAPES`.

    Raises:
        ConfigError: If there are fewer GPUs than ranks, and the shape is not `tiny`.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found >= num_ranks:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if shape != "tiny":
        raise ConfigError(
            f"--tp {num_ranks} measures {num_ranks} CUDA GPUs, and torch {torch.__version__} sees "
            f"{found}; run it on a machine with as many, or use --shape tiny on CPUs."
        )
    return torch.device("cpu")


@contextlib.contextmanager
def rank_group(shape: str, num_ranks: int) -> Iterator[torch.device]:
    """Join the process group of all ranks, and leave it in the end.

    Args:
        shape: A key of `SHAPES`.
        num_ranks: Processes that torchrun has started.

    Yields:
        The device of this rank.

    Raises:
        ConfigError: If torchrun started another number of processes, or there are fewer GPUs.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != num_ranks:
        raise ConfigError(
            f"--tp {num_ranks} was started in {started} processes; call it without torchrun, or "
            f"with --nproc-per-node={num_ranks}."
        )
    device = rank_device(num_ranks, shape)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
