"""Training on several GPUs: each process sees other sequences, and gradients are averaged.

Started by `torchrun --nproc-per-node=N`, which sets RANK, WORLD_SIZE and LOCAL_RANK; without it
there is one process and nothing here does anything.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sparda_compile.errors import UnsupportedInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from sparda_compile.ranks.agreement import Ranks

__all__ = [
    "average_",
    "check_whole",
    "local_device",
    "process_group",
    "rank",
    "rank_of_environment",
    "world_size",
]


def local_device() -> torch.device:
    """Return the device of this process: its own GPU if there are any, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def rank() -> int:
    """Return the number of this process, 0 if it is the only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def rank_of_environment() -> int:
    """Return the number that torchrun gave this process, 0 without it."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that torchrun made, unless the caller has; leave it again.

    Args:
        device: Where the model is: NCCL for GPUs, gloo for the CPU.
    """
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if is_alone or not dist.is_available() or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_whole(ranks: Ranks) -> None:
    """Refuse to train for a model that is sharded.

    Args:
        ranks: Processes that the model is sharded over.

    Raises:
        UnsupportedInputError: If there are several.
    """
    if not ranks.is_alone:
        raise UnsupportedInputError(
            f"the model is sharded over {ranks.size} ranks, and a Forecast is trained on a whole "
            "one; load the model without distributed_config in every process that torchrun starts, "
            "which trains in parallel on other sequences. The file is sharded when it is loaded."
        )


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in one message."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
