"""What a node does to state, to streams and to events, as the table of instructions says it.

State tensors are graph inputs whose names begin with `sparda_`. An op writes those that its
schema marks as mutated and reads the others that it takes.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from torch import fx

from sparda_compile.isa.streams import COMPUTE
from sparda_compile.isa.table import Instruction, instruction_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Access",
    "accesses",
    "argument",
    "awaited_event",
    "bound_arguments",
    "conflicts",
    "instruction",
    "is_disjoint",
    "is_state",
    "results_of",
    "set_argument",
    "started_event",
    "stream_of",
    "takes",
    "uses_a_part",
    "waits_of",
    "written",
]

STATE_PREFIX: Final = "sparda_"


@dataclasses.dataclass(frozen=True)
class Access:
    """One use of one state tensor."""

    state: str
    is_write: bool


def is_state(node: Any) -> bool:
    """Whether a node is a state tensor; a number that a caller gives is none."""
    return (
        isinstance(node, fx.Node)
        and node.op == "placeholder"
        and node.name.startswith(STATE_PREFIX)
        and not isinstance(node.meta.get("val"), int)
    )


def instruction(node: fx.Node) -> Instruction | None:
    """Return what a node calls, None if that is no op of ours."""
    return instruction_of(node.target) if node.op == "call_function" else None


def bound_arguments(node: fx.Node) -> Iterator[tuple[str, bool, Any]]:
    """Yield name, whether it is written, and value of each argument that a sparda op is given."""
    args, kwargs = node.args, node.kwargs
    for i, (name, is_write, _) in enumerate(_of(node).arguments):
        if i < len(args):
            yield name, is_write, args[i]
        elif name in kwargs:
            yield name, is_write, kwargs[name]


def argument(node: fx.Node, name: str) -> Any:
    """Return one argument of a sparda op, or its default."""
    it = _of(node)
    place = it.places[name]
    if place < len(node.args):
        return node.args[place]
    return node.kwargs[name] if name in node.kwargs else it.arguments[place][2]


def results_of(node: fx.Node) -> tuple[str, ...]:
    """Return the names of a sparda op's results."""
    return _of(node).results


def written(node: fx.Node) -> list[fx.Node]:
    """Return what a sparda op is given to write, in the order of its arguments."""
    given = [value for _, is_write, value in bound_arguments(node) if is_write]
    return [n for v in given for n in (v if isinstance(v, (list, tuple)) else (v,))]


def takes(node: fx.Node, name: str) -> bool:
    """Whether a sparda op has an argument of that name."""
    return name in _of(node).places


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set one argument of a sparda op."""
    place = _of(node).places[name]
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def _of(node: fx.Node) -> Instruction:
    it = instruction(node)
    assert it is not None, f"{node.name} calls no op of this library"
    return it


def accesses(node: fx.Node) -> list[Access]:
    """Return the state that a node reads and writes.

    A fork uses none: it takes state so that the scheduler leaves it behind what writes that state.
    """
    it = instruction(node)
    if it is None or it.forks:
        return []
    found = []
    for _, is_write, value in bound_arguments(node):
        values = value if isinstance(value, (list, tuple)) else (value,)
        found += [Access(v.name, is_write) for v in values if is_state(v)]
    return found


def stream_of(node: fx.Node) -> int:
    """Return the stream that a node's work runs on."""
    it = instruction(node)
    if it is None:
        return COMPUTE
    return int(argument(node, "stream")) if it.stream is None else it.stream


def started_event(node: fx.Node) -> int | None:
    """Return the event that a node records, None if it records none."""
    it = instruction(node)
    return int(argument(node, "event")) if it is not None and it.starts else None


def awaited_event(node: fx.Node) -> int | None:
    """Return the event that a node waits for, None if it waits for none."""
    it = instruction(node)
    return int(argument(node, "event")) if it is not None and it.waits else None


def waits_of(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that wait for an event, in program order."""
    return [node for node in graph.nodes if awaited_event(node) is not None]


def is_disjoint(first: fx.Node, second: fx.Node) -> bool:
    """Whether two ops that share a tensor use different parts of it; see `isa.table.Part`.

    `attend_resident` reads the pages of a plan's hits; `prefetch_blocks` of the same plan writes
    the pages of its misses.
    """
    one, other = instruction(first), instruction(second)
    mine, theirs = (it.part if it is not None else None for it in (one, other))
    if mine is None or theirs is None or mine.name == theirs.name or mine.tensor != theirs.tensor:
        return False
    by = argument(first, mine.by), argument(second, theirs.by)
    return bool(by[0].args and by[1].args and by[0].args[0] is by[1].args[0])


def uses_a_part(node: fx.Node) -> bool:
    """Whether an op uses only a part of a tensor, so that others may use the rest."""
    it = instruction(node)
    return it is not None and it.part is not None


def conflicts(first: fx.Node, second: fx.Node) -> list[str]:
    """Return the state tensors over which two nodes must be ordered."""
    if is_disjoint(first, second):
        return []
    mine = {a.state: a.is_write for a in accesses(first)}
    both = [(a.state, a.is_write or mine[a.state]) for a in accesses(second) if a.state in mine]
    return [state for state, is_write in both if is_write]
