"""The program that ran, checked against the graph that was proved.

The verifier proves a graph; what runs is a list of calls made from it. So the first run of every
program is recorded: for each call its stream, its events, the storages that it takes and returns,
and which storages the program lets go of behind it. Then

    same        the ops ran in the order of the graph, each on its stream, with its events, on the
                state and on the results that the graph gives it
    ordered     of two accesses of one storage, one of them a write, the first happens before the
                second, in the run and in two runs after one another
    held        when a storage is let go of, and its memory may be anybody's next, all that side
                streams do with it has happened before; what a piece writes in place nobody takes
                any more

A run is as long as its graph, and calls in Python are the same whether a GPU does the work later,
replays it or has no part in it, so one recorded run stands for all. Happens-before follows what
`engines.Engine` promises, by vector clocks. Storages are known by the memory that they begin at,
and owned by the registers of the program: what else may keep one alive is not counted on.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

from sparda_compile.errors import TransferRaceError
from sparda_compile.graph.effects import (
    awaited_event,
    bound_arguments,
    instruction,
    is_disjoint,
    started_event,
    stream_of,
)
from sparda_compile.graph.fake_runner import leaves_of
from sparda_compile.graph.nodes import call_name, fake_value, is_sparda
from sparda_compile.isa.streams import BEHIND, COMPUTE, STREAM_NAMES
from sparda_compile.isa.table import Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from sparda_compile.program.recording import Record, Recording

from sparda_compile.passes.check.clocks import Clock, join

__all__ = ["RunProof", "check_recording"]


@dataclasses.dataclass(frozen=True)
class RunProof:
    """What was checked of a run.

    Attributes:
        ops: Ops that ran as the graph has them.
        pieces: Calls of pieces.
        conflicts: Pairs of accesses that were found ordered.
        storages: Storages that were let go of behind all that uses them.
    """

    ops: int
    pieces: int
    conflicts: int
    storages: int


def check_recording(graph: fx.Graph, recording: Recording) -> RunProof:
    """Check a recorded run against the graph that was proved.

    Args:
        graph: The verified graph.
        recording: One run of the program that was made from it.

    Returns:
        What was checked.

    Raises:
        TransferRaceError: At the first difference, naming the call.
    """
    records = recording.records
    num_ops = _check_same(graph, recording)
    clocks = _clocks(records, runs=2)
    conflicts = _check_ordered(recording, clocks)
    storages = _check_held(records, clocks)
    return RunProof(num_ops, len(records) - num_ops, conflicts, storages)


def _wrong(text: str) -> TransferRaceError:
    return TransferRaceError(
        f"lowered program: {text}. The graph was proved and the program that ran is another one; "
        "this is a bug of sparda_compile. Nothing that this step returned can be relied on."
    )


def _check_same(graph: fx.Graph, recording: Recording) -> int:
    """Compare the ops that ran with those of the graph; returns how many there are."""
    nodes = [node for node in graph.nodes if is_sparda(node)]
    ran = [record for record in recording.records if record.node is not None]
    for node, record in itertools.zip_longest(nodes, ran):
        if node is None or record is None or node.name != record.name:
            wanted, got = (x.name if x is not None else "the end" for x in (node, record))
            raise _wrong(f"{got} ran where the graph has {wanted}")
    made: dict[str, int] = dict(recording.state)
    by_op = iter(zip(nodes, ran, strict=True))
    for record in recording.records:
        if record.node is None:
            continue
        node, _ = next(by_op)
        _check_streams(node, record)
        _check_arguments(node, record, made)
        _note_results(node, record, made)
    return len(nodes)


def _check_streams(node: fx.Node, record: Record) -> None:
    stream, started, awaited = stream_of(node), started_event(node), awaited_event(node)
    it = instruction(node)
    works = it is not None and it.work is not Work.NONE
    num_works = 1 if works and stream != COMPUTE else len(record.streams)
    if set(record.streams) - {stream} or len(record.streams) != num_works:
        got = ", ".join(STREAM_NAMES[s] for s in record.streams) or "no"
        raise _wrong(f"{record.name} ran on {got} stream, not on {STREAM_NAMES[stream]}")
    starts = [(started, stream)] if started is not None else []
    waits = [(awaited, stream)] if awaited is not None else []
    if record.starts != starts:
        raise _wrong(f"{record.name} recorded events (event, stream) {record.starts}, not {starts}")
    if record.waits != waits:
        raise _wrong(f"{record.name} waited for events (event, stream) {record.waits}, not {waits}")


def _check_arguments(node: fx.Node, record: Record, made: dict[str, int]) -> None:
    for name, _, value in bound_arguments(node):
        nodes = [v for v in leaves_of(value) if hasattr(v, "op")]
        sources = [v for v in nodes if not isinstance(fake_value(v), int)]
        got = record.takes.get(name, [])
        if len(sources) != len(got):
            raise _wrong(
                f"{record.name} was given {len(got)} tensors as {name}, not {len(sources)}"
            )
        for source, storage in zip(sources, got, strict=True):
            known = made.get(source.name)
            if known is not None and known != storage and storage:
                raise _wrong(f"{record.name} took something else than {source.name} as {name}")


def _note_results(node: fx.Node, record: Record, made: dict[str, int]) -> None:
    """Remember where the results of an op are, for the ops that take them."""
    items = {user.args[1]: user.name for user in node.users if call_name(user) == "getitem"}
    if items and len(record.returns) >= len(items):
        for index, name in items.items():
            made[name] = record.returns[int(str(index))]
    elif len(record.returns) == 1:
        made[node.name] = record.returns[0]


def _clocks(records: Sequence[Record], runs: int) -> list[Clock]:
    """Return the clock of each call's work, for some runs after one another."""
    streams = range(len(STREAM_NAMES))
    now = [[0 for _ in streams] for _ in streams]
    clocks: list[Clock] = []
    for _ in range(runs):
        events: dict[int, list[int]] = {}
        for record in records:
            mine = now[record.stream]
            for other in BEHIND[record.stream]:
                join(mine, now[other])
            for event, _ in record.waits:
                join(mine, events.get(event, ()))
            mine[record.stream] += 1
            clocks.append(tuple(mine))
            for event, stream in record.starts:
                events[event] = list(now[stream])
    return clocks


def _check_ordered(recording: Recording, clocks: Sequence[Clock]) -> int:
    records, users = recording.records, dict[int, list[tuple[int, bool]]]()
    states = {storage: name for name, storage in recording.state.items()}
    for i, record in enumerate(records):
        for storage, is_write in record.accesses().items():
            users.setdefault(storage, []).append((i, is_write))
        for storage in record.frees:
            # What is let go of may be given to a later call: those are checked by `held`.
            _check_pairs(records, clocks, users.pop(storage, []), None)
    return sum(
        _check_pairs(records, clocks, mine, states.get(storage, ""))
        for storage, mine in users.items()
    )


def _check_pairs(
    records: Sequence[Record],
    clocks: Sequence[Clock],
    users: Sequence[tuple[int, bool]],
    state: str | None,
) -> int:
    """Check the users of one storage.

    Args:
        records: The calls.
        clocks: Of two runs.
        users: Calls that use the storage, each with whether it writes.
        state: The state tensor that it holds, "" for another that is there in the next run too;
            None for one that is let go of before.
    """
    found = 0
    size = len(records)
    next_run = [(i + size, is_write) for i, is_write in users]
    later = users if state is None else [*users, *next_run]
    written = [user for user in later if user[1]]
    pairs = {(min(w, u), max(w, u)) for w, _ in written for u, _ in later if w != u}
    for first, second in sorted(pairs):
        if first >= size:
            continue
        one, other = records[first], records[second % size]
        if second < size and _are_apart(one, other, state):
            continue
        found += 1
        if not clocks[first][one.stream] <= clocks[second][one.stream]:
            when = " of the next step" if second >= size else ""
            raise _wrong(
                f"{one.name} ({STREAM_NAMES[one.stream]} stream) and {other.name} "
                f"({STREAM_NAMES[other.stream]} stream){when} use one storage and are not ordered"
            )
    return found


def _are_apart(one: Record, other: Record, state: str | None) -> bool:
    """Whether two calls of a run use different parts of a state tensor."""
    if not state or one.node is None or other.node is None:
        return False
    return is_disjoint(one.node, other.node, state)


def _check_held(records: Sequence[Record], clocks: Sequence[Clock]) -> int:
    """Check that what side streams use is let go of only behind them."""
    used: dict[int, list[int]] = {}
    live: set[int] = set()
    count = 0
    compute: Clock = (0,) * len(STREAM_NAMES)
    for i, record in enumerate(records):
        if record.stream == COMPUTE:
            compute = clocks[i]
        mine = {s for taken in record.takes.values() for s in taken}
        if record.overwritten:
            raise _wrong(f"{record.name} wrote its results to memory that is still in use")
        for storage in {*record.returns} - {0}:
            # A piece may return a view of what it takes; an op writes where it was told it may.
            may_be = mine if record.node is None else record.reused
            if storage in live and storage not in may_be:
                raise _wrong(f"{record.name} was given memory that is still in use")
            live.add(storage)
        if record.stream != COMPUTE:
            for storage in record.accesses():
                used.setdefault(storage, []).append(i)
        for storage in record.frees:
            count += 1
            live.discard(storage)
            for user in used.pop(storage, ()):
                if clocks[user][records[user].stream] > compute[records[user].stream]:
                    raise _wrong(
                        f"memory that {records[user].name} uses on the "
                        f"{STREAM_NAMES[records[user].stream]} stream is let go of behind "
                        f"{record.name}, before a wait has joined it"
                    )
    return count
