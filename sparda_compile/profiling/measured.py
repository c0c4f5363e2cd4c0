"""A decode step as it was measured, beside what the scheduler predicted.

    predicted   [model] append update attention [model .......]     one row per node
    measured    [model] append update attention [model .........]   the kernels of one replay

The nodes of both are the same. Between two of ours the compiler fuses the model's as it likes, so
there the sum of the predictions stands beside one row, `model_before_<node>`; it counts to the
layer whose attention came before it.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.errors import BackendUnavailableError, UnsupportedInputError
from sparda_compile.isa.streams import COMPUTE, STREAM_NAMES
from sparda_compile.profiling.kernel_trace import planned_nodes, read_kernels, split_replays
from sparda_compile.profiling.record import record_events
from sparda_compile.profiling.replay import FORK, MODEL, OWN_OPS, WAIT, Replay, Totals, totals_of
from sparda_compile.report.speculation import PARTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from sparda_compile.profiling.kernel_trace import PlannedNode
    from sparda_compile.program.plan import Plan
    from sparda_compile.report.schedule import Schedule, ScheduleRow

__all__ = ["MeasuredSchedule", "NodeTimes", "Times", "measure", "measure_step"]

_WARM_STEPS: Final = 3  # one compiles, one captures, one replays
_TIMED_STEPS: Final = 10


@dataclasses.dataclass(frozen=True)
class NodeTimes:
    """What one node took; a wait: how long the compute stream stood still.

    Attributes:
        node: Name of the FX node, or `model_before_<node>`, or `model_end`.
        op: What it calls, or `model`.
        layer: Layer that it belongs to, -1 if none.
        stream: 0 compute, 1 copy, 2 select, 3 attend, 4 repair.
        predicted_us: As the schedule says.
        measured_us: As the trace says.
    """

    node: str
    op: str
    layer: int
    stream: int
    predicted_us: float
    measured_us: float


@dataclasses.dataclass(frozen=True)
class Times:
    """Sums over some nodes: what they are, how many, predicted and measured."""

    name: str
    count: int
    predicted_us: float
    measured_us: float

    @property
    def difference_us(self) -> float:
        """How much longer it took than predicted."""
        return self.measured_us - self.predicted_us


@dataclasses.dataclass(frozen=True, repr=False)
class MeasuredSchedule:
    """A replay of a decode step beside its schedule.

    Attributes:
        device: What it ran on.
        schedule: What was predicted.
        nodes: Both times of each node, in program order.
        rows: The timeline as measured. Bytes are not, and 0.
        predicted: Sums of the schedule.
        measured: Sums of the replay.
        replays_us: Time of each replay in the trace; `rows` are those of the median one.
        step_us: Median time of a step without a profiler, None if it was not taken.
    """

    device: str
    schedule: Schedule
    nodes: tuple[NodeTimes, ...]
    rows: tuple[ScheduleRow, ...]
    predicted: Totals
    measured: Totals
    replays_us: tuple[float, ...]
    step_us: float | None = None

    def __repr__(self) -> str:
        """Return what was planned and measured in one line."""
        return (
            f"<MeasuredSchedule of {self.schedule.phase} on {self.device}: {len(self.nodes)} "
            f"nodes, {self.predicted.step_us:.1f} us predicted, {self.measured.step_us:.1f} us "
            "measured>"
        )

    def ops(self) -> list[Times]:
        """Return the sums by op, the model first."""
        order = sorted(self.nodes, key=lambda each: each.op != MODEL)
        return _sums(order, lambda each: each.op.removeprefix("sparda."))

    def each_node(self) -> list[Times]:
        """Return the times of every node by itself, in program order."""
        return [Times(each.node, 1, each.predicted_us, each.measured_us) for each in self.nodes]

    def speculation(self) -> list[Times]:
        """Return the sums by part of mode `speculate`, as `report.speculation` names them."""
        names = {op: name for name, ops in PARTS.items() for op in ops}
        return _sums((n for n in self.nodes if n.op in names), lambda each: names[each.op])

    def layers(self, stream: int) -> list[Times]:
        """Return the sums by layer of a stream's work, waits left out; -1 is no layer."""
        mine = [each for each in self.nodes if each.stream == stream and each.op != WAIT]
        return _sums(sorted(mine, key=lambda each: each.layer), lambda each: str(each.layer))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "device": self.device,
            "phase": self.schedule.phase,
            "machine": self.schedule.machine,
            "step_us": self.step_us,
            "replays_us": list(self.replays_us),
            "predicted": dataclasses.asdict(self.predicted),
            "measured": dataclasses.asdict(self.measured),
            "ops": [dataclasses.asdict(times) for times in self.ops()],
            "speculation": [dataclasses.asdict(times) for times in self.speculation()],
            "nodes": [dataclasses.asdict(each) for each in self.nodes],
            "rows": [
                {"node": r.node, "stream": r.stream, "start_us": r.start_us, "end_us": r.end_us}
                for r in self.rows
            ],
        }

    def to_html(self, path: str | Path) -> Path:
        """Write both timelines as one self-contained HTML file and return its path."""
        return self.schedule.to_html(path, self.rows)


def _sums(nodes: Iterable[NodeTimes], name: Callable[[NodeTimes], str]) -> list[Times]:
    groups: dict[str, list[NodeTimes]] = {}
    for each in nodes:
        groups.setdefault(name(each), []).append(each)
    return [
        Times(
            key,
            len(group),
            sum(each.predicted_us for each in group),
            sum(each.measured_us for each in group),
        )
        for key, group in groups.items()
    ]


def measure_step(
    step: Callable[[], object], plan: Plan, *, replays: int = 5, trace: Path | None = None
) -> MeasuredSchedule:
    """Profile a decode step on the present CUDA device.

    Args:
        step: Takes one step of the plan's program; it is called `replays` + 13 times.
        plan: Of a decode.
        replays: Steps to profile.
        trace: Where to keep the profiler's Chrome trace; None keeps none.

    Returns:
        The step as measured, node by node.

    Raises:
        BackendUnavailableError: If there is no CUDA device.
        UnsupportedInputError: If the plan has no schedule, or the step does not replay a CUDA
            graph of it.
    """
    import torch

    schedule = _schedule_of(plan)
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            "measure_step profiles kernels on a CUDA device, and torch finds none. Run it where "
            "torch.cuda.is_available(); Schedule has the prediction."
        )
    for _ in range(_WARM_STEPS):
        step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_TIMED_STEPS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    step_us = statistics.median(1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(marks))

    def steps() -> None:
        for _ in range(replays):
            step()

    events = record_events(steps, trace)
    nodes = planned_nodes(plan.graph_module.graph, plan.layout.batch_size)
    return measure(events, schedule, nodes, torch.cuda.get_device_name(), step_us)


def _schedule_of(plan: Plan) -> Schedule:
    schedule = plan.schedule
    if schedule is None or schedule.phase != "decode":
        what = "has no schedule" if schedule is None else f"is of a {schedule.phase}"
        raise UnsupportedInputError(
            f"the plan {what}, so there is no prediction to measure against. Pass the plan of a "
            "decode in a mode that offloads, with schedule_transfers among its passes."
        )
    return schedule


def measure(
    events: Iterable[Mapping[str, Any]],
    schedule: Schedule,
    nodes: Sequence[PlannedNode],
    device: str,
    step_us: float | None = None,
) -> MeasuredSchedule:
    """Read a trace.

    Args:
        events: `traceEvents` of a Chrome trace with whole replays of one decode step.
        schedule: What was predicted.
        nodes: The sparda nodes of the same plan.
        device: What it ran on.
        step_us: Time of a step without a profiler.

    Returns:
        The step as measured, node by node.

    Raises:
        UnsupportedInputError: If there is no replay, or one of something else.
    """
    kernels = read_kernels(events)
    replays = split_replays(kernels)
    if not replays:
        raise UnsupportedInputError(
            f"the trace holds no replay of a CUDA graph, only {len(kernels)} kernels launched one "
            "by one. Profile a decode with cuda_graph=True after its second step."
        )
    lengths = [max(k.end_us for k in replay) - replay[0].start_us for replay in replays]
    median = sorted(range(len(replays)), key=lengths.__getitem__)[(len(replays) - 1) // 2]
    replay = Replay(replays[median], nodes)
    rows = replay.rows()
    return MeasuredSchedule(
        device=device,
        schedule=schedule,
        nodes=tuple(_compare(schedule.rows, nodes, rows)),
        rows=tuple(rows),
        predicted=_predicted_totals(schedule),
        measured=replay.totals(rows),
        replays_us=tuple(lengths),
        step_us=step_us,
    )


def _compare(
    predicted: Sequence[ScheduleRow], nodes: Sequence[PlannedNode], rows: Sequence[ScheduleRow]
) -> list[NodeTimes]:
    """Return both times of each node and, between them, of the model."""
    measured = {row.node: row for row in rows}
    planned = {node.node: node for node in nodes}
    found: list[NodeTimes] = []
    between, layer = 0.0, -1

    def close(name: str) -> None:
        if between or name in measured:
            us = _length(measured[name]) if name in measured else 0.0
            found.append(NodeTimes(name, MODEL, layer, COMPUTE, between, us))

    for row in predicted:
        node = planned.get(row.node)
        if node is None or (node.stream == COMPUTE and node.op not in (FORK, WAIT)):
            if node is None or not node.kernels:
                between += _length(row)
                continue
            close(f"model_before_{row.node}")
            between = 0.0
            layer = row.layer if row.op in OWN_OPS else layer
        if node.kernels or node.op == WAIT:
            us = _length(measured[row.node])
            found.append(NodeTimes(row.node, row.op, row.layer, node.stream, _length(row), us))
    close("model_end")
    return found


def _length(row: ScheduleRow) -> float:
    return row.end_us - row.start_us


def _predicted_totals(schedule: Schedule) -> Totals:
    spans: list[list[tuple[float, float]]] = [[] for _ in STREAM_NAMES]
    for row in schedule.rows:
        if row.op != WAIT:
            spans[row.stream].append((row.start_us, row.end_us))
    return totals_of(spans, schedule.exposed_us)
