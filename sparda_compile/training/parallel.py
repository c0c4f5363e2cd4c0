"""Training on several GPUs: replicas see other sequences, and gradients are averaged.

Started by `torchrun --nproc-per-node=N`, which sets RANK, WORLD_SIZE and LOCAL_RANK; without it
there is one process and nothing here does anything. A replica is one process, or those that a model
is sharded over:

    process    0  1  2  3
    replica    0  0  1  1      reads batches of its own
    rank       0  1  0  1      holds KV heads of its own

A layer's loss is a mean over KV heads and sequences. Ranks have as many heads each, and replicas as
many sequences, so the mean over all processes is what one process would have; of the gradient, too,
where a rank's own is zero in the rows of heads that others hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.ranks.collectives import group_named

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from sparda_compile.ranks.agreement import Ranks

__all__ = [
    "Replicas",
    "average_",
    "local_device",
    "process_group",
    "rank",
    "rank_of_environment",
    "world_of_environment",
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


def world_of_environment() -> int:
    """Return the number of processes that torchrun starts, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that torchrun made, unless the caller has; leave it again.

    Args:
        device: Where the model is: NCCL for GPUs, gloo for the CPU.
    """
    is_alone = world_of_environment() == 1
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


@dataclasses.dataclass(frozen=True)
class Replicas:
    """The replicas of the model that train together.

    Attributes:
        count: How many there are.
        number: Which one this process is of.
    """

    count: int
    number: int

    @classmethod
    def of(cls, ranks: Ranks) -> Replicas:
        """Return those of a model that is on some ranks, or on one.

        Raises:
            UnsupportedInputError: If the processes are no whole number of replicas, each of
                neighbours.
        """
        if ranks.is_alone:
            return cls(world_size(), rank())
        members = dist.get_process_group_ranks(group_named(ranks.group))
        are_neighbours = members == list(range(members[0], members[0] + ranks.size))
        if world_size() % ranks.size or members[0] % ranks.size or not are_neighbours:
            raise UnsupportedInputError(
                f"the model is sharded over the processes {members} of {world_size()}; replicas "
                "that train together are of as many neighbours each. Load it with "
                "distributed_config=replica_plan(tp) of sparda_compile.training.replica_plan."
            )
        return cls(world_size() // ranks.size, members[0] // ranks.size)

    def share(self, layers: Sequence[int]) -> Sequence[int]:
        """Return the layers, of all, that this replica looks at where one replica is enough."""
        return layers[self.number :: self.count]


def average_(tensors: Sequence[Tensor], ranks: Ranks | None = None) -> None:
    """Replace each tensor by its mean, in one message.

    Args:
        tensors: Of this process; all have as many.
        ranks: Processes to take the mean over; None is all.
    """
    size = world_size() if ranks is None else ranks.size
    if size == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=None if ranks is None else group_named(ranks.group))
    flat /= size
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
