"""Which state a node reads and writes, taken from its op's schema; and what a step is made of.

State tensors are graph inputs whose names begin with `sparda_`. An op writes those that its
schema marks as mutated and reads the others that it takes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

from sparda_compile.passes.fx import call_name, is_sparda
from sparda_compile.schedule import COMPUTE, COPY

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Access", "accesses", "conflicts", "is_disjoint", "is_state", "stream_of", "takes"]

STATE_PREFIX: Final = "sparda_"
_ALWAYS_COPY: Final = frozenset({"sparda.prefetch_blocks", "sparda.offload_blocks"})


@dataclasses.dataclass(frozen=True)
class Access:
    """One use of one state tensor."""

    state: str
    is_write: bool


def is_state(node: Any) -> bool:
    """Whether a node is a state tensor."""
    return (
        isinstance(node, fx.Node)
        and node.op == "placeholder"
        and node.name.startswith(STATE_PREFIX)
    )


@functools.cache
def _parameters(target: Any) -> tuple[tuple[str, bool, Any], ...]:
    """Return name, whether it is written, and default of each argument of an op."""
    assert isinstance(target, torch._ops.OpOverload)
    return tuple(
        (e.name, e.alias_info is not None and e.alias_info.is_write, e.default_value)
        for e in target._schema.arguments
    )


@functools.cache
def _places(target: Any) -> dict[str, int]:
    return {name: i for i, (name, _, _) in enumerate(_parameters(target))}


def bound_arguments(node: fx.Node) -> Iterator[tuple[str, bool, Any]]:
    """Yield name, whether it is written, and value of each argument that a sparda op is given."""
    args, kwargs = node.args, node.kwargs
    for i, (name, is_write, _) in enumerate(_parameters(node.target)):
        if i < len(args):
            yield name, is_write, args[i]
        elif name in kwargs:
            yield name, is_write, kwargs[name]


def argument(node: fx.Node, name: str) -> Any:
    """Return one argument of a sparda op, or its default."""
    place = _places(node.target)[name]
    if place < len(node.args):
        return node.args[place]
    return node.kwargs[name] if name in node.kwargs else _parameters(node.target)[place][2]


def takes(node: fx.Node, name: str) -> bool:
    """Whether a sparda op has an argument of that name."""
    return name in _places(node.target)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set one argument of a sparda op."""
    place = _places(node.target)[name]
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def accesses(node: fx.Node) -> list[Access]:
    """Return the state that a node reads and writes.

    A fork uses none: it takes state so that the scheduler leaves it behind what writes that state.
    """
    if not is_sparda(node) or call_name(node) == "sparda.fork_stream":
        return []
    found = []
    for _, is_write, value in bound_arguments(node):
        values = value if isinstance(value, (list, tuple)) else (value,)
        found += [Access(v.name, is_write) for v in values if is_state(v)]
    return found


def stream_of(node: fx.Node) -> int:
    """Return the stream that a node's work runs on."""
    if not is_sparda(node):
        return COMPUTE
    if call_name(node) in _ALWAYS_COPY:
        return COPY
    return int(argument(node, "stream")) if takes(node, "stream") else COMPUTE


def is_disjoint(first: fx.Node, second: fx.Node) -> bool:
    """Whether two accesses of one pool never touch the same page.

    `attend_resident` reads the pages of a plan's hits; `prefetch_blocks` of the same plan writes
    the pages of its misses.
    """
    for reader, writer in ((first, second), (second, first)):
        if call_name(reader) == "sparda.attend_resident" and call_name(writer) == (
            "sparda.prefetch_blocks"
        ):
            plan = argument(reader, "is_miss").args[0]
            return bool(argument(writer, "miss_blocks").args[0] is plan)
    return False


def conflicts(first: fx.Node, second: fx.Node) -> list[str]:
    """Return the state tensors over which two nodes must be ordered."""
    if is_disjoint(first, second):
        return []
    mine = {a.state: a.is_write for a in accesses(first)}
    both = [(a.state, a.is_write or mine[a.state]) for a in accesses(second) if a.state in mine]
    return [state for state, is_write in both if is_write]
