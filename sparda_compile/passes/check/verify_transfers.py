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
the same plan touch different pages (hits, misses), so they need no order within a step; neither do
`attend_predicted` and the `append_kv` of the same position (blocks before it, its block).

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
    is_disjoint,
)
from sparda_compile.graph.tags import ORDER
from sparda_compile.isa.streams import COMPUTE, STREAM_NAMES
from sparda_compile.passes.base import Fact, PassContext, PassResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx
from sparda_compile.passes.check.clocks import Clock, happens_before, vector_clocks
from sparda_compile.passes.check.issued import Issued, extract_program

__all__ = ["VerifyTransfers", "check_program"]


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


def check_program(program: Sequence[Issued]) -> int:
    """Check one step and two consecutive ones; returns the number of conflicting pairs.

    Raises:
        TransferRaceError: At the first pair that is not ordered.
    """
    clocks = vector_clocks(program, steps=2)
    _check_join(program, clocks)
    _check_data(program, clocks)
    _check_keepalive(program, clocks)
    _check_allocation(program, clocks)
    return _check_state(program, clocks)


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
            ordered = happens_before(program, clocks, source, i)
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
            leads_to = (w for c, w in copies if c == i or happens_before(program, clocks, i, c))
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
        if checked and not happens_before(program, clocks, last_compute, i):
            raise _race(
                "allocation",
                program[last_compute % len(program)],
                issued,
                "the second may be given memory that the first has not finished with",
            )


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
            if first != second and not is_disjoint(a.node, b.node, state):
                found += 1
                early, late = (first, second) if a.order < b.order else (second, first)
                if not happens_before(program, clocks, early, late):
                    raise _race("state", program[early], program[late], f"both use {state}")
            for early, late in {(first, second), (second, first)}:
                if not happens_before(program, clocks, early, late + size):
                    raise _race(
                        "state",
                        program[early],
                        program[late],
                        f"both use {state}, the second in the next step",
                    )
    return found
