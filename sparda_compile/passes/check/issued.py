"""A graph as the verifier sees it: what is issued to which stream, in order."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sparda_compile.graph.effects import (
    argument,
    awaited_event,
    instruction,
    started_event,
    stream_of,
    takes,
)
from sparda_compile.graph.liveness import side_stream_uses
from sparda_compile.graph.nodes import call_name, fake_value, is_sparda, tensor_shape
from sparda_compile.graph.tags import ORDER
from sparda_compile.isa.streams import COMPUTE, COPY, SELECT
from sparda_compile.isa.table import Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx


__all__ = ["Issued", "extract_program"]


@dataclasses.dataclass(frozen=True)
class Issued:
    """One node as the verifier sees it.

    Attributes:
        name: Name of the node.
        stream: Stream that it runs on.
        order: Place in the semantic program.
        inputs: Temporaries that it takes, as the numbers of the instructions that make them.
        keepalive: Those of `inputs` that it only keeps alive.
        touches: Temporaries that it uses on a side stream.
        forks: Whether it lets a side stream go on from here.
        forked_by: Number of the fork that it waits for on its side stream.
        selected_by: Selections whose results a copy without a fork takes; it starts behind them.
        chosen_from: Number of the issued that it takes one result of; it is no work itself.
        records: Event that it records when it ends.
        waits: Event that its stream waits for.
        allocates: Whether it makes a non-empty tensor.
        node: The FX node, for state conflicts.
    """

    name: str
    stream: int
    order: int
    inputs: tuple[int, ...]
    keepalive: tuple[int, ...]
    touches: tuple[int, ...]
    forks: bool
    forked_by: int | None
    selected_by: tuple[int, ...]
    chosen_from: int | None
    records: int | None
    waits: int | None
    allocates: bool
    node: fx.Node


def extract_program(graph: fx.Graph) -> list[Issued]:
    """Return the graph as instructions, in program order."""
    nodes = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
    number = {node: i for i, node in enumerate(nodes)}

    def numbers(sources: Sequence[fx.Node]) -> tuple[int, ...]:
        return tuple(number[n] for n in sources if n in number)

    program = []
    for node in nodes:
        it, stream = instruction(node), stream_of(node)
        waits, starts = awaited_event(node), started_event(node)
        fork = argument(node, "after") if stream != COMPUTE and takes(node, "after") else None
        works = it is not None and it.work is not Work.NONE
        uses = side_stream_uses(node) if stream != COMPUTE else []
        program.append(
            Issued(
                name=node.name,
                stream=stream_of(made_by(node)),
                order=ORDER.get(node, -1),
                inputs=numbers(node.all_input_nodes),
                keepalive=numbers(argument(node, "keepalive")) if waits is not None else (),
                touches=numbers(uses) + ((number[node],) if _drops_a_result(node, uses) else ()),
                forks=it is not None and it.forks,
                forked_by=number[fork] if fork is not None else None,
                selected_by=numbers(_selections(node)) if stream == COPY and not fork else (),
                chosen_from=number[made] if (made := made_by(node)) is not node else None,
                records=starts,
                waits=waits,
                allocates=works and starts is None and tensor_shape(node) != (0,),
                node=node,
            )
        )
    return program


def _selections(node: fx.Node) -> list[fx.Node]:
    """Return the inputs of a copy that the select stream makes."""
    return [n for n in node.all_input_nodes if stream_of(made_by(n)) == SELECT]


def _drops_a_result(node: fx.Node, uses: Sequence[fx.Node]) -> bool:
    """Whether a side-stream op has a result that nobody takes, and so nobody keeps alive."""
    value = fake_value(node)
    taken = {u.args[1] for u in uses if call_name(u) == "getitem" and u.args[0] is node}
    return bool(uses) and isinstance(value, (tuple, list)) and len(taken) < len(value)


def made_by(node: fx.Node) -> fx.Node:
    """Return the sparda op that a node chooses one result of, else the node itself."""
    sources = node.all_input_nodes
    is_choice = call_name(node) == "getitem" and sources and is_sparda(sources[0])
    return sources[0] if is_choice else node
