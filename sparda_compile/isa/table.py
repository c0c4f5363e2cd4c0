"""The table of instructions: what each op `sparda::*` is, said once, where the op is defined.

    schema      which arguments it takes, and which of them it writes
    stream      where it runs, or that its argument `stream` says so
    event       whether it starts something that is awaited, or awaits it
    work        what its time is made of, for the cost model
    kernels     what it launches on a GPU in a decode step, and by what it copies in a prefill
    parts       which part of a tensor it uses, where two ops share one without touching
    order       which ops of a layer it comes before or behind

`define` fills the table; scheduler, verifier, grammar, profiler, report and docs read it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["INSTRUCTIONS", "PREFIX", "Instruction", "Part", "Work", "instruction_of", "op_name"]

PREFIX: Final = "sparda."


class Work(enum.Enum):
    """What an op's time is made of."""

    NONE = "nothing: it only orders others"
    TOUCHED = "its latency, and what it reads and writes: of pools the selected blocks alone"
    PIECE = "what the nodes of its piece take"
    HITS = "the same; of pools the selected blocks that have a page"
    MISSES = "the same; of pools the selected blocks that a copy has brought"
    PREDICTED = "the same; of pools the blocks that were predicted"
    REPAIRED = "the same; of pools the selected blocks that were not predicted"
    TOKEN_SCORES = "its latency, and products of each new token's vectors with the summary"
    TOKEN_BLOCKS = "its latency, and products with keys and values of each new token's blocks"
    NEW_TOKENS = "its latency, and the new tokens, read and written"
    TO_DEVICE = "a copy of the selected blocks that the step before has not brought"
    TO_STAGING = "a copy of the past blocks that a prompt's tokens read"
    TO_HOST = "a copy of the blocks that the step has filled"
    REDUCED = "its latency, and 2 (n - 1) / n of what n ranks add up, at the rate between them"
    GATHERED = "its latency, and (n - 1) / n of what n ranks gather, at the rate between them"


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a tensor that an op uses.

    Two ops that name different parts of one tensor touch nothing in common, if they name them by
    results of one op, or by one and the same value.

    Attributes:
        tensor: Name of the argument that takes the tensor.
        name: Of the part, such as `hits`.
        by: Name of the argument that says which part that is.
        holds: Given the arguments by name, tensors as fake ones: whether the op uses that part
            alone; None for always.
    """

    tensor: str
    name: str
    by: str
    holds: Callable[[Mapping[str, Any]], bool] | None = None


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What an op is.

    Attributes:
        name: Without `sparda::`.
        op: What `torch.library` made of it.
        stream: Stream that it runs on; None if its argument `stream` says so.
        results: Names of its results; () for none or one.
        starts: Whether it records its argument `event` when what it started has ended.
        waits: Whether its stream, or that of its argument `stream`, goes on only behind `event`.
        forks: Whether it lets a side stream go on from here; it uses nothing of what it takes.
        work: What its time is made of.
        kernels: Names of the kernels that it may launch in a decode step.
        prompt_copies: Names of the kernels by which it copies blocks in a prefill.
        launched: Given the arguments by name, tensors as fake ones, and the number of sequences:
            those that it does launch, in order; None for all of them.
        parts: Of some tensors, the part that it uses; of the others it uses all.
        before: Ops of its layer that come behind it.
        behind: Ops of its layer that come before it.
        latency_us: What it takes beside its bytes on a machine that was not asked; None is one
            launch.
        is_free: Whether a layer may have any number of it; else the grammar says how many.
        is_marker: Whether it marks a place in a captured graph; no program has it.
        is_collective: Whether all ranks of a process group do it together; all of them issue the
            same ones in the same order.
        is_for_later: Whether only later steps use what it does, so that it may run while this one
            waits.
        workspace: Given what a call gives it, tensors as fake ones: the most bytes that it takes on
            a GPU beside its results; None where that is next to nothing.
    """

    name: str
    op: Any
    stream: int | None
    results: tuple[str, ...]
    starts: bool
    waits: bool
    forks: bool
    work: Work
    kernels: tuple[str, ...]
    prompt_copies: tuple[str, ...]
    launched: Callable[[Mapping[str, Any], int], tuple[str, ...]] | None
    parts: tuple[Part, ...]
    before: tuple[str, ...]
    behind: tuple[str, ...]
    latency_us: float | None
    is_free: bool = False
    is_marker: bool = False
    is_collective: bool = False
    is_for_later: bool = False
    workspace: Callable[..., int] | None = None

    @functools.cached_property
    def arguments(self) -> tuple[tuple[str, bool, Any], ...]:
        """Name, whether it is written, and default of each argument."""
        return tuple(
            (e.name, e.alias_info is not None and e.alias_info.is_write, e.default_value)
            for e in self.op._opoverload._schema.arguments
        )

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """Place of each argument."""
        return {name: i for i, (name, _, _) in enumerate(self.arguments)}

    @functools.cached_property
    def tensors(self) -> tuple[str, ...]:
        """Names of the arguments that are tensors or lists of tensors."""
        schema = self.op._opoverload._schema
        return tuple(e.name for e in schema.arguments if "Tensor" in str(e.type))


INSTRUCTIONS: Final[dict[str, Instruction]] = {}


@functools.cache
def op_name(target: Any) -> str | None:
    """Return the name of an op of ours without its namespace, None for anything else."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
    elif isinstance(target, torch._ops.OpOverloadPacket):
        name = target._qualified_op_name
    else:
        return None
    namespace, found, short = str(name).partition("::")
    return short if found and namespace == "sparda" else None


@functools.cache
def instruction_of(target: Any) -> Instruction | None:
    """Return the instruction that a node's target is, None if it is none."""
    name = op_name(target)
    return INSTRUCTIONS.get(name) if name is not None else None
