"""The predicted times of a program."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparda_compile.graph.effects import (
    awaited_event,
    started_event,
)
from sparda_compile.graph.nodes import call_name, is_sparda
from sparda_compile.graph.tags import LAYER
from sparda_compile.isa.streams import BEHIND, COMPUTE, STREAM_NAMES
from sparda_compile.report.schedule import ScheduleRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from sparda_compile.passes.base import PassContext
    from sparda_compile.passes.schedule.cost import Cost


__all__ = ["end_us", "simulate"]


def end_us(rows: Sequence[ScheduleRow]) -> float:
    """Return when the last row ends, microseconds."""
    return max((row.end_us for row in rows), default=0.0)


def simulate(
    nodes: Sequence[fx.Node],
    costs: dict[fx.Node, Cost],
    ctx: PassContext,
    streams: dict[fx.Node, int],
) -> list[ScheduleRow]:
    """Predict the times of a program.

    Each stream runs its nodes in program order. What a side stream does starts behind all that was
    issued before it to the streams that `streams.BEHIND` names; a wait holds its stream back to the
    event that it names. On a machine without overlap all streams are one.
    """
    clock = [0.0] * len(STREAM_NAMES)
    event_end: dict[int, float] = {}
    rows = []
    for node in nodes:
        if node.op in ("placeholder", "output"):
            continue
        name, cost, stream = call_name(node), costs[node], streams[node]
        lane = stream if ctx.machine.overlaps else COMPUTE
        exposed = 0.0
        if (awaited := awaited_event(node)) is not None:
            done = event_end.get(awaited, 0.0)
            exposed = max(done - clock[lane], 0.0) if ctx.machine.overlaps else 0.0
            start, end = clock[lane], clock[lane] + exposed
        else:
            start = max(clock[each] for each in (lane, *BEHIND[lane]))
            end = start + cost.us
        clock[lane] = end
        if (started := started_event(node)) is not None:
            event_end[started] = end
        if cost.us or is_sparda(node):
            layer = int(LAYER.get(node, -1))
            rows.append(
                ScheduleRow(
                    node.name,
                    name,
                    layer,
                    stream,
                    start,
                    end,
                    cost.hbm_bytes,
                    cost.link_bytes,
                    exposed,
                )
            )
    return rows
