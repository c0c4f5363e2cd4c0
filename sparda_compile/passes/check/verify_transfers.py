"""VerifyTransfers: prove that no copy races with a producer, a consumer, a reuse or the next step.

The graph becomes a straight program of instructions on streams. Vector clocks give
happens-before: a stream's own order, plus fork (compute -> a side stream), a list of misses that a
copy takes (select -> copy) and wait (from the stream that recorded the event to the one that waits,
which mostly is compute). Then

    state        of two accesses of one state tensor, one of them a write, the one that was written
                 first in the semantic program happens before the other
    data         a result happens before its use
    keepalive    what a side stream reads or writes is still used, on the compute stream, at or
                 behind the wait for the copy that it leads to
    allocation   all compute work issued before a side-stream op that allocates happens before it,
                 for its memory may be what that work has just freed
    join         every started copy has its wait, and the side streams are done when the step ends

State is checked for one step and for two consecutive ones. `attend_resident` and the prefetch of
the same plan touch different pages (hits, misses), so they need no order.

Changes nothing, so there is no before and after; raises TransferRaceError naming both nodes.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, ClassVar

from sparda_compile.errors import TransferRaceError
from sparda_compile.graph.dependences import mark_order
from sparda_compile.graph.effects import (
    accesses,
    argument,
    awaited_event,
    instruction,
    is_disjoint,
    started_event,
    stream_of,
    takes,
)
from sparda_compile.graph.liveness import side_stream_uses
from sparda_compile.graph.nodes import call_name, fake_value, is_sparda, tensor_shape
from sparda_compile.graph.tags import ORDER
from sparda_compile.isa.streams import COMPUTE, COPY, SELECT, STREAM_NAMES
from sparda_compile.isa.table import Work
from sparda_compile.passes.base import Fact, PassContext, PassResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

__all__ = ["Issued", "VerifyTransfers", "check_program", "extract_program"]


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


@dataclasses.dataclass(frozen=True)
class VerifyTransfers:
    """Check every schedule. Counts: instructions, conflicts, events."""

    name: ClassVar[str] = "verify_transfers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FORECAST_INSERTED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFERS_VERIFIED})
    preserves_numerics: ClassVar[bool] = True

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Raise TransferRaceError if anything is unordered."""
        if not any(ORDER.on(n) for n in gm.graph.nodes):
            mark_order(gm.graph)
        program = extract_program(gm.graph)
        num_conflicts = check_program(program)
        counts = {
            "instructions": len(program),
            "conflicts": num_conflicts,
            "events": sum(i.records is not None or i.forks for i in program),
        }
        return PassResult(gm, modified=False, counts=counts)


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
                stream=stream_of(_made_by(node)),
                order=ORDER.get(node, -1),
                inputs=numbers(node.all_input_nodes),
                keepalive=numbers(argument(node, "keepalive")) if waits is not None else (),
                touches=numbers(uses) + ((number[node],) if _drops_a_result(node, uses) else ()),
                forks=it is not None and it.forks,
                forked_by=number[fork] if fork is not None else None,
                selected_by=numbers(_selections(node)) if stream == COPY and not fork else (),
                chosen_from=number[made] if (made := _made_by(node)) is not node else None,
                records=starts,
                waits=waits,
                allocates=works and starts is None and tensor_shape(node) != (0,),
                node=node,
            )
        )
    return program


def _selections(node: fx.Node) -> list[fx.Node]:
    """Return the inputs of a copy that the select stream makes."""
    return [n for n in node.all_input_nodes if stream_of(_made_by(n)) == SELECT]


def _drops_a_result(node: fx.Node, uses: Sequence[fx.Node]) -> bool:
    """Whether a side-stream op has a result that nobody takes, and so nobody keeps alive."""
    value = fake_value(node)
    taken = {u.args[1] for u in uses if call_name(u) == "getitem" and u.args[0] is node}
    return bool(uses) and isinstance(value, (tuple, list)) and len(taken) < len(value)


def _made_by(node: fx.Node) -> fx.Node:
    """Return the sparda op that a node chooses one result of, else the node itself."""
    sources = node.all_input_nodes
    is_choice = call_name(node) == "getitem" and sources and is_sparda(sources[0])
    return sources[0] if is_choice else node


def check_program(program: Sequence[Issued]) -> int:
    """Check one step and two consecutive ones; returns the number of conflicting pairs.

    Raises:
        TransferRaceError: At the first pair that is not ordered.
    """
    clocks = _vector_clocks(program, steps=2)
    _check_join(program, clocks)
    _check_data(program, clocks)
    _check_keepalive(program, clocks)
    _check_allocation(program, clocks)
    return _check_state(program, clocks)


Clock = tuple[int, ...]


def _vector_clocks(program: Sequence[Issued], steps: int) -> list[Clock]:
    """Return each issued's clock, for `steps` consecutive runs of the program."""
    streams = range(len(STREAM_NAMES))
    now = [[0 for _ in streams] for _ in streams]
    clocks: list[Clock] = []
    for step in range(steps):
        begin = step * len(program)
        forks: dict[int, list[int]] = {}
        events: dict[int, list[int]] = {}
        for i, issued in enumerate(program):
            mine = now[issued.stream]
            if issued.chosen_from is not None and issued.chosen_from < i:
                clocks.append(clocks[begin + issued.chosen_from])
                continue
            if issued.forked_by is not None and issued.forked_by in forks:
                _join(mine, forks[issued.forked_by])
            for source in issued.selected_by:
                if source < i:
                    _join(mine, clocks[begin + source])
            if issued.waits is not None and issued.waits in events:
                _join(mine, events[issued.waits])
            mine[issued.stream] += 1
            clocks.append(tuple(mine))
            if issued.forks:
                forks[i] = list(mine)
            if issued.records is not None:
                events[issued.records] = list(mine)
    return clocks


def _join(mine: list[int], other: Sequence[int]) -> None:
    for stream, count in enumerate(other):
        mine[stream] = max(mine[stream], count)


def _happens_before(
    program: Sequence[Issued], clocks: Sequence[Clock], first: int, second: int
) -> bool:
    it = program[first % len(program)]
    stream = it.stream if it.chosen_from is None else program[it.chosen_from].stream
    return first != second and clocks[first][stream] <= clocks[second][stream]


def _race(kind: str, first: Issued, second: Issued, detail: str) -> TransferRaceError:
    return TransferRaceError(
        f"{kind}: {first.name} ({STREAM_NAMES[first.stream]} stream) and {second.name} "
        f"({STREAM_NAMES[second.stream]} stream) are not ordered: {detail}."
    )


def _check_join(program: Sequence[Issued], clocks: Sequence[Clock]) -> None:
    recorded = {i.records for i in program if i.records is not None}
    awaited = {i.waits for i in program if i.waits is not None}
    none = (0,) * len(STREAM_NAMES)
    end = max((clocks[i] for i, x in enumerate(program) if x.stream == COMPUTE), default=none)
    for i, issued in enumerate(program):
        if issued.waits is not None and issued.waits not in recorded:
            raise TransferRaceError(
                f"join: {issued.name} waits for event {issued.waits}, which nothing records."
            )
        if issued.records is not None and issued.records not in awaited:
            raise TransferRaceError(
                f"join: {issued.name} starts a copy (event {issued.records}) that no "
                "wait joins before the step ends."
            )
        if clocks[i][issued.stream] > end[issued.stream]:
            raise TransferRaceError(
                f"join: {issued.name} runs on the {STREAM_NAMES[issued.stream]} stream "
                "and has not ended when the step ends; every wait comes before it."
            )


def _check_data(program: Sequence[Issued], clocks: Sequence[Clock]) -> None:
    for i, issued in enumerate(program):
        for source in issued.inputs:
            is_ticket = issued.waits is not None and program[source].records is not None
            only_kept = source in issued.keepalive
            ordered = _happens_before(program, clocks, source, i)
            if source >= i or not (ordered or is_ticket or only_kept):
                raise _race("data", program[source], issued, "the second uses the first's result")
            if is_ticket and program[source].records != issued.waits:
                raise _race("data", program[source], issued, "the wait is for another copy's event")


def _own_waits(program: Sequence[Issued], clocks: Sequence[Clock]) -> dict[int, int]:
    """Return, for each issued of a side stream, the wait for the copy that it leads to.

    An earlier wait for a later copy joins it too; what is kept alive goes by its own all the same,
    so that it does not depend on where the waits of other copies stand.
    """
    # A wait of a side stream frees nothing: what counts is when compute has joined it.
    waits = {x.waits: i for i, x in enumerate(program) if x.waits is not None and not x.stream}
    copies = [(i, waits[x.records]) for i, x in enumerate(program) if x.records in waits]
    found = {}
    for i, issued in enumerate(program):
        if issued.stream != COMPUTE:
            leads_to = (w for c, w in copies if c == i or _happens_before(program, clocks, i, c))
            if (wait := next(leads_to, None)) is not None:
                found[i] = wait
    return found


def _check_keepalive(program: Sequence[Issued], clocks: Sequence[Clock]) -> None:
    last_use: dict[int, int] = {}
    for i, issued in enumerate(program):
        last_use |= dict.fromkeys(issued.inputs, i)
    wait_for = _own_waits(program, clocks)
    for i, issued in enumerate(program):
        if not issued.touches:
            continue
        wait = wait_for.get(i, len(program))
        for temporary in issued.touches:
            last = last_use.get(temporary, temporary)
            if program[last].stream != COMPUTE or last < wait:
                raise TransferRaceError(
                    f"keepalive: {program[temporary].name} is used by {issued.name} on the "
                    f"{STREAM_NAMES[issued.stream]} stream, but its memory is free after "
                    f"{program[last].name}, which comes before the wait for that copy; the wait "
                    "must keep it alive."
                )


def _check_allocation(program: Sequence[Issued], clocks: Sequence[Clock]) -> None:
    last_compute = -1
    for i in range(len(clocks)):  # of both steps: the first may leave memory to the second
        issued = program[i % len(program)]
        if issued.stream == COMPUTE:
            if not issued.forks:
                last_compute = i
            continue
        checked = issued.allocates and last_compute >= 0
        if checked and not _happens_before(program, clocks, last_compute, i):
            raise _race(
                "allocation", program[last_compute % len(program)], issued,
                "the second may be given memory that the first has not finished with",
            )  # fmt: skip


def _users(program: Sequence[Issued]) -> dict[str, dict[int, bool]]:
    """Return, for each state tensor, who uses it and whether they write it."""
    users: dict[str, dict[int, bool]] = {}
    for i, issued in enumerate(program):
        for access in accesses(issued.node):
            mine = users.setdefault(access.state, {})
            mine[i] = mine.get(i, False) or access.is_write
    return users


def _check_state(program: Sequence[Issued], clocks: Sequence[Clock]) -> int:
    size, found = len(program), 0
    for state, writes in _users(program).items():
        for first, second in itertools.combinations_with_replacement(writes, 2):
            if not (writes[first] or writes[second]):
                continue
            a, b = program[first], program[second]
            if first != second and not is_disjoint(a.node, b.node):
                found += 1
                early, late = (first, second) if a.order < b.order else (second, first)
                if not _happens_before(program, clocks, early, late):
                    raise _race("state", program[early], program[late], f"both use {state}")
            for early, late in {(first, second), (second, first)}:
                if not _happens_before(program, clocks, early, late + size):
                    raise _race(
                        "state", program[early], program[late],
                        f"both use {state}, the second in the next step",
                    )  # fmt: skip
    return found
