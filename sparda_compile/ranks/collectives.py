"""Collectives as ops: what the ranks of a process group compute together.

They run on the compute stream, in the order of the program. All ranks have to issue the same ones
in the same order, so no pass moves them against each other; copies may run beside them. On a GPU
NCCL does the work, inside of the step's CUDA graph; on a CPU gloo does.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparda_compile.errors import RankLostError
from sparda_compile.isa.define import define
from sparda_compile.isa.engines import current_engine
from sparda_compile.isa.streams import COMPUTE
from sparda_compile.isa.table import INSTRUCTIONS, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["all_gather", "all_reduce", "group_named", "lost_ranks", "sum_in_place"]

# Its other name is older; torch 2.13 warns of it.
_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Of NCCL between GPUs of one host, until `sparda calibrate` has measured it: see docs/parallel.md.
_LATENCY_US = 12.0


@contextlib.contextmanager
def lost_ranks(what: str) -> Iterator[None]:
    """Say in a sentence that a collective failed because a rank did not take part.

    Args:
        what: The collective.

    Raises:
        RankLostError: In the place of what torch.distributed raised.
    """
    try:
        yield
    except RankLostError:
        raise
    except RuntimeError as error:
        first = next(iter(str(error).splitlines()), "no message")
        raise RankLostError(
            f"{what} failed: another rank has ended, raised an error of its own, called something "
            f"else, or did not come within the timeout of the process group ({first}). See what "
            "the other ranks say, and start all of them again."
        ) from error


def group_named(name: str) -> Any:
    """Return a process group by its name.

    Raises:
        RankLostError: If it is gone.
    """
    registry: Any = dist.distributed_c10d
    try:
        return registry._resolve_process_group(name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise RankLostError(
            f"the process group {name!r} that the model was sharded over is gone, as after "
            "destroy_process_group(): its programs need the other ranks. Load the model and "
            "optimize it again under a new process group."
        ) from error


def _run(what: str, group: str, work: Callable[[Any], Any]) -> None:
    found = group_named(group)

    def together() -> None:
        with lost_ranks(what):
            work(found)

    current_engine().submit(COMPUTE, together)


@define(
    fake=lambda a: a.x.new_empty(a.x.shape),
    work=Work.REDUCED,
    latency_us=_LATENCY_US,
    is_collective=True,
)
def all_reduce(x: Tensor, num_ranks: int, group: str) -> Tensor:
    """Add up the tensors of all ranks: `out = sum_r x_r`, the same bits on every rank.

    Reads and writes x once, and sends 2 (n - 1) / n of it to other ranks. A program that takes x
    nowhere else adds up in its memory, see `sum_in_place`.

    Args:
        x: [...] this rank's summand, any dtype.
        num_ranks: n, ranks of the group.
        group: Its name.

    Raises:
        RankLostError: If a rank does not take part.
    """
    return sum_in_place(x.clone(memory_format=torch.contiguous_format), num_ranks, group)


def sum_in_place(x: Tensor, num_ranks: int, group: str) -> Tensor:
    """Do what `all_reduce` does, in the memory of x, which is what it returns.

    Args:
        x: [...] this rank's summand, contiguous.
        num_ranks: n, ranks of the group.
        group: Its name.

    Raises:
        RankLostError: If a rank does not take part.
    """
    del num_ranks
    _run("all_reduce", group, lambda found: dist.all_reduce(x, group=found))
    return x


@define(
    fake=lambda a: a.x.new_empty((a.num_ranks * a.x.shape[0], *a.x.shape[1:])),
    work=Work.GATHERED,
    latency_us=_LATENCY_US,
    is_collective=True,
)
def all_gather(x: Tensor, num_ranks: int, group: str) -> Tensor:
    """Put the tensors of all ranks behind each other: `out = cat([x_0, ..., x_n-1], dim=0)`.

    Reads x once, writes n times as much, and sends (n - 1) / n of the result to other ranks.

    Args:
        x: [L, ...] this rank's part, any dtype; all parts have one shape.
        num_ranks: n, ranks of the group.
        group: Its name.

    Returns:
        [n * L, ...], in the order of the ranks.

    Raises:
        RankLostError: If a rank does not take part.
    """
    parts = x.new_empty((num_ranks * x.shape[0], *x.shape[1:]))
    mine = x.contiguous()
    _run(
        "all_gather",
        group,
        lambda found: _GATHER(parts, mine, group=found),
    )
    return parts


def _note_part(ctx: Any, inputs: tuple[Tensor, int, str], output: Tensor) -> None:
    x, _, group = inputs
    del output
    ctx.length = x.shape[0]
    ctx.first = x.shape[0] * group_named(group).rank()


def _own_part(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    """Return the gradient of this rank's part; that of what all ranks made it of is their sum."""
    return gradient.narrow(0, ctx.first, ctx.length), None, None


# Where a Forecast starts is a derivative through it: `forecast/start.py`.
INSTRUCTIONS["all_gather"].op.register_autograd(_own_part, setup_context=_note_part)
