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

    from sparda_compile.isa.table import Part

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
# Stands for what the ranks of a process group have done together so far.
_RANKS: Final = "ranks"


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
    Collectives all write what stands for the other ranks, which keeps them in their order.
    """
    it = instruction(node)
    if it is None or it.forks:
        return []
    found = [Access(_RANKS, is_write=True)] if it.is_collective else []
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


def is_disjoint(first: fx.Node, second: fx.Node, state: str) -> bool:
    """Whether two ops use different parts of a state tensor; see `isa.table.Part`.

    `attend_resident` reads the pages of a plan's hits; `prefetch_blocks` of the same plan writes
    the pages of its misses. `attend_predicted` reads blocks before the one that `lengths` says;
    `append_kv` with the same `lengths` writes that one.
    """
    mine, theirs = _part_of(first, state), _part_of(second, state)
    if mine is None or theirs is None or mine.name == theirs.name:
        return False
    return _maker(argument(first, mine.by)) is _maker(argument(second, theirs.by))


def uses_a_part(node: fx.Node, state: str) -> bool:
    """Whether an op uses only a part of a state tensor, so that others may use the rest."""
    return _part_of(node, state) is not None


def _part_of(node: fx.Node, state: str) -> Part | None:
    """Return the part of a state tensor that an op uses, None for all of it."""
    it = instruction(node)
    for part in it.parts if it is not None else ():
        if getattr(argument(node, part.tensor), "name", None) == state:
            given = {name: _fake(value) for name, _, value in bound_arguments(node)}
            return part if part.holds is None or part.holds(given) else None
    return None


def _fake(value: Any) -> Any:
    return value.meta.get("val") if isinstance(value, fx.Node) else value


def _maker(node: fx.Node) -> fx.Node:
    """Return the op that a value is a result of, the value itself if it is no one's result."""
    sources = node.all_input_nodes
    is_choice = len(sources) == 1 and instruction(sources[0]) is not None
    return sources[0] if is_choice and instruction(node) is None else node


def conflicts(first: fx.Node, second: fx.Node) -> list[str]:
    """Return the state tensors over which two nodes must be ordered."""
    mine = {a.state: a.is_write for a in accesses(first)}
    both = [(a.state, a.is_write or mine[a.state]) for a in accesses(second) if a.state in mine]
    return [s for s, is_write in both if is_write and not is_disjoint(first, second, s)]
