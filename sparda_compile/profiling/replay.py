"""One replay of a decode step: what ran where and when, as rows of a timeline.

A sparda node takes from the start of its first kernel to the end of its last. What runs on the
compute stream between two of them is the model, one row. A wait is the time that the compute stream
stood still until the awaited copy ended.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from typing import TYPE_CHECKING, Final

from sparda_compile.isa.streams import ATTEND, COMPUTE, COPY, REPAIR, SELECT, STREAM_NAMES
from sparda_compile.profiling.kernel_trace import assign_kernels
from sparda_compile.report.schedule import ScheduleRow

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sparda_compile.profiling.kernel_trace import Kernel, PlannedNode

__all__ = ["FORK", "MODEL", "OWN_OPS", "WAIT", "Replay", "Totals", "merged_spans", "totals_of"]

MODEL: Final = "model"
WAIT: Final = "sparda.wait_blocks"
FORK: Final = "sparda.fork_stream"
# Ops that a layer does for itself; what is selected and copied ahead is for a layer to come.
OWN_OPS: Final = frozenset(
    {
        "sparda.append_kv",
        "sparda.update_summary",
        "sparda.sparse_attention",
        "sparda.attend_resident",
        "sparda.attend_missing",
        "sparda.attend_predicted",
        "sparda.repair_predicted",
        "sparda.window_attention",
    }
)


@dataclasses.dataclass(frozen=True)
class Totals:
    """One step in sums, microseconds.

    Attributes:
        step_us: From its first start to its last end.
        compute_us: The compute stream worked.
        copy_us: The copy or the repair stream worked.
        select_us: The select stream worked.
        attend_us: The attend stream worked.
        exposed_us: The compute stream waited for others.
        overlap: Share of `copy_us` in which the compute stream worked too, 1.0 without copies.
        attend_overlap: The same of `attend_us`.
    """

    step_us: float
    compute_us: float
    copy_us: float
    select_us: float
    attend_us: float
    exposed_us: float
    overlap: float
    attend_overlap: float


class Replay:
    """The kernels of one replay, each with its node, from the first start on."""

    def __init__(self, kernels: Sequence[Kernel], nodes: Sequence[PlannedNode]) -> None:
        origin = kernels[0].start_us
        self.nodes = nodes
        by_name = {node.node: node for node in nodes}
        found = assign_kernels(kernels, nodes)
        owner = {id(k): by_name[name] for name, mine in found.items() for k in mine}
        self.spans = {
            name: (mine[0].start_us - origin, mine[-1].end_us - origin)
            for name, mine in found.items()
        }
        work = [(k.start_us - origin, k.end_us - origin, owner.get(id(k))) for k in kernels]
        self.compute = [each for each in work if not each[2] or each[2].stream == COMPUTE]
        self._by_stream = tuple(
            [(a, b) for a, b, node in work if (node.stream if node else COMPUTE) == stream]
            for stream in range(len(STREAM_NAMES))
        )

    def rows(self) -> list[ScheduleRow]:
        """Return the timeline: the model between the nodes, the nodes, the waits."""
        nodes = [
            _row(node.node, node.op, node.layer, node.stream, self.spans[node.node])
            for node in self.nodes
            if node.node in self.spans
        ]
        rows = [*self._model(), *nodes, *self._waits()]
        return sorted(rows, key=lambda row: (row.start_us, row.end_us))

    def _model(self) -> list[ScheduleRow]:
        rows: list[ScheduleRow] = []
        between: list[tuple[float, float]] = []
        layer, seen = -1, set()

        def close(name: str) -> None:
            if between:
                span = (between[0][0], max(end for _, end in between))
                rows.append(_row(name, MODEL, layer, COMPUTE, span))
                between.clear()

        for start, end, node in self.compute:
            if node is None:
                between.append((start, end))
            elif node.node not in seen:
                seen.add(node.node)
                close(f"model_before_{node.node}")
                layer = node.layer if node.op in OWN_OPS else layer
        close("model_end")
        return rows

    def _waits(self) -> list[ScheduleRow]:
        done = self._done()
        starts = [start for start, _, _ in self.compute]
        ends = list(itertools.accumulate((end for _, end, _ in self.compute), max))
        own = [n for n in self.nodes if n.stream == COMPUTE and n.node in self.spans]
        rows, before, clock = [], 0, 0.0
        for node in self.nodes:
            if before < len(own) and node is own[before]:
                before, clock = before + 1, self.spans[node.node][1]
            if node.op != WAIT:
                continue
            until = self.spans[own[before].node][0] if before < len(own) else ends[-1]
            arrived = done.get(node.event, 0.0)
            place = bisect.bisect_right(starts, arrived) - 1
            still = max(ends[place], clock) if place >= 0 else clock
            exposed = arrived - still if still < arrived else 0.0
            if exposed:
                clock = arrived
            span = (still, arrived) if exposed else (until, until)
            rows.append(_row(node.node, node.op, node.layer, COMPUTE, span, exposed))
        return rows

    def _done(self) -> dict[int, float]:
        """Return when each event was reached: what its node did, or its stream before it, ended."""
        ends, done = [0.0] * len(STREAM_NAMES), {}
        for node in self.nodes:
            if node.node in self.spans:
                ends[node.stream] = max(ends[node.stream], self.spans[node.node][1])
            if node.event >= 0 and node.op not in (WAIT, FORK):
                done[node.event] = ends[node.stream]
        return done

    def totals(self, rows: Sequence[ScheduleRow]) -> Totals:
        """Return the sums of the replay."""
        return totals_of(self._by_stream, sum(row.exposed_us for row in rows))


def _row(
    node: str, op: str, layer: int, stream: int, span: tuple[float, float], exposed: float = 0.0
) -> ScheduleRow:
    return ScheduleRow(node, op, layer, stream, *span, 0, 0, exposed)


def totals_of(spans: Sequence[Iterable[tuple[float, float]]], exposed_us: float) -> Totals:
    """Return the sums of one step.

    Args:
        spans: By stream, start and end of each piece of work, without waits.
        exposed_us: Sum of the waits.
    """
    lanes = [list(each) for each in spans]
    if len(lanes) > REPAIR:
        lanes[COPY] += lanes.pop(REPAIR)
    merged = [merged_spans(each) for each in lanes]
    busy = [sum(end - start for start, end in each) for each in merged]
    busy += [0.0] * (len(STREAM_NAMES) - len(merged))
    ends = [end for each in merged for _, end in each]

    def overlap(stream: int) -> float:
        """Return the share of a stream's work that lies beside that of compute."""
        if not busy[stream]:
            return 1.0
        return _shared(merged[stream], merged[COMPUTE]) / busy[stream]

    return Totals(
        step_us=max(ends, default=0.0),
        compute_us=busy[COMPUTE],
        copy_us=busy[COPY],
        select_us=busy[SELECT],
        attend_us=busy[ATTEND],
        exposed_us=exposed_us,
        overlap=overlap(COPY),
        attend_overlap=overlap(ATTEND),
    )


def _shared(some: Iterable[tuple[float, float]], others: Sequence[tuple[float, float]]) -> float:
    """Return how long two sets of merged spans lie beside each other."""
    return sum(
        max(min(end, until) - max(start, since), 0.0)
        for start, end in some
        for since, until in others
    )


def merged_spans(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return spans without those that are empty, put together where they touch."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(span for span in spans if span[1] > span[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
