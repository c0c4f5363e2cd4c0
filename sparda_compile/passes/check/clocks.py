"""Vector clocks: what happens before what, on streams that events join."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparda_compile.isa.streams import STREAM_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparda_compile.passes.check.issued import Issued


__all__ = ["Clock", "happens_before", "join", "vector_clocks"]


Clock = tuple[int, ...]
"""How many things of each stream are known to have ended."""


def vector_clocks(program: Sequence[Issued], steps: int) -> list[Clock]:
    """Return the clock of each thing issued, for `steps` consecutive runs of the program."""
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
                join(mine, forks[issued.forked_by])
            for source in issued.selected_by:
                if source < i:
                    join(mine, clocks[begin + source])
            if issued.waits is not None and issued.waits in events:
                join(mine, events[issued.waits])
            mine[issued.stream] += 1
            clocks.append(tuple(mine))
            if issued.forks:
                forks[i] = list(mine)
            if issued.records is not None:
                events[issued.records] = list(mine)
    return clocks


def join(mine: list[int], other: Sequence[int]) -> None:
    """Let a stream know what another clock knows."""
    for stream, count in enumerate(other):
        mine[stream] = max(mine[stream], count)


def happens_before(
    program: Sequence[Issued], clocks: Sequence[Clock], first: int, second: int
) -> bool:
    """Whether one thing issued has ended when another begins; numbers count on over runs."""
    it = program[first % len(program)]
    stream = it.stream if it.chosen_from is None else program[it.chosen_from].stream
    return first != second and clocks[first][stream] <= clocks[second][stream]
