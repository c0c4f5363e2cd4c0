"""What the scheduler decided: one row per node, with stream and predicted times."""

from __future__ import annotations

import dataclasses
import html
import json
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.files import check_writable, replacing
from sparda_compile.isa.streams import STREAM_NAMES
from sparda_compile.report.speculation import SpeculationPart, speculation_parts
from sparda_compile.report.text import columns, html_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Schedule", "ScheduleRow"]

_HEAD: Final = ("start us", "end us", "stream", "layer", "link KiB", "exposed", "op", "node")
_OP_HEAD: Final = ("nodes", "us in all", "exposed us", "op")
# What an interactive prompt shows at most: ops, and letters of a name.
_NUM_OPS: Final = 12
_OP_WIDTH: Final = 48


@dataclasses.dataclass(frozen=True)
class ScheduleRow:
    """One node of the rewritten graph, in program order.

    Attributes:
        node: Name of the FX node.
        op: What it calls, `sparda.prefetch_blocks` or `linear`.
        layer: Layer that it belongs to, -1 if none.
        stream: 0 compute, 1 copy, 2 select, 3 attend, 4 repair.
        start_us: Predicted start, microseconds from the start of the step.
        end_us: Predicted end.
        hbm_bytes: Bytes that it reads and writes in device memory.
        link_bytes: Bytes that it moves between CPU and device, as expected.
        exposed_us: For a wait, the time that the compute stream stands still; else 0.
    """

    node: str
    op: str
    layer: int
    stream: int
    start_us: float
    end_us: float
    hbm_bytes: int
    link_bytes: int
    exposed_us: float


@dataclasses.dataclass(frozen=True, repr=False)
class Schedule:
    """The order, the stream and the predicted time of every node of one step.

    Attributes:
        phase: `decode` or `prefill`.
        machine: Name of the machine whose constants predicted the times.
        rows: One per node, in program order.
        choices: What the scheduler chose for each chain of transfers, in words.
        baseline_us: Predicted step time with every copy in line.
    """

    phase: str
    machine: str
    rows: tuple[ScheduleRow, ...]
    choices: tuple[str, ...]
    baseline_us: float

    @property
    def total_us(self) -> float:
        """Predicted time of one step, in microseconds."""
        return max((row.end_us for row in self.rows), default=0.0)

    @property
    def exposed_us(self) -> float:
        """Predicted time that the compute stream waits for copies, in microseconds."""
        return sum(row.exposed_us for row in self.rows)

    @property
    def link_bytes(self) -> int:
        """Bytes that one step is expected to move between CPU and device."""
        return sum(row.link_bytes for row in self.rows)

    @property
    def speculation(self) -> list[SpeculationPart]:
        """What speculation, repair and the next prediction take; [] where nothing speculates."""
        return speculation_parts(self.rows)

    @property
    def summary(self) -> str:
        """What there is to know in one line."""
        return (
            f"{self.phase} on {self.machine}: {self.total_us:.1f} us predicted, "
            f"{self.baseline_us:.1f} us with copies in line, {self.exposed_us:.1f} us exposed, "
            f"{self.link_bytes / 1024:.0f} KiB over the link"
        )

    def __str__(self) -> str:
        """Return a summary line and a table of the sparda nodes, one line each."""
        lines = (
            (
                f"{row.start_us:.1f}",
                f"{row.end_us:.1f}",
                STREAM_NAMES[row.stream],
                str(row.layer) if row.layer >= 0 else "",
                f"{row.link_bytes / 1024:.0f}" if row.link_bytes else "",
                f"{row.exposed_us:.1f}" if row.exposed_us else "",
                row.op,
                row.node,
            )
            for row in self.rows
            if row.op.startswith("sparda.")
        )
        return f"{self.summary}\n{columns(_HEAD, lines, text=2)}"

    def __repr__(self) -> str:
        """Return the summary and the ops that take longest: one screen, however deep the model."""
        ops = columns(_OP_HEAD, self._longest_ops(), text=1)
        return f"<Schedule of {self.summary}>\n{ops}\n{self._more}"

    def _repr_html_(self) -> str:
        """Return the same for a notebook."""
        table = html_table(f"Schedule of {self.summary}", _OP_HEAD, self._longest_ops())
        return f"{table}<p>{html.escape(self._more)}</p>"

    @property
    def _more(self) -> str:
        return f"{len(self.rows)} nodes; print() shows those of sparda, to_html(path) draws all."

    def _longest_ops(self) -> list[tuple[str, ...]]:
        """Return count, time, exposed time and name of the ops that take longest."""
        ops: dict[str, list[ScheduleRow]] = {}
        for row in self.rows:
            ops.setdefault(row.op, []).append(row)
        times = {op: sum(row.end_us - row.start_us for row in rows) for op, rows in ops.items()}
        longest = sorted(times, key=lambda op: -times[op])[:_NUM_OPS]
        exposed = {op: sum(row.exposed_us for row in ops[op]) for op in longest}
        return [
            (
                str(len(ops[op])),
                f"{times[op]:.1f}",
                f"{exposed[op]:.1f}" if exposed[op] else "",
                _shortened(op),
            )
            for op in longest
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "phase": self.phase,
            "machine": self.machine,
            "total_us": self.total_us,
            "baseline_us": self.baseline_us,
            "exposed_us": self.exposed_us,
            "link_bytes": self.link_bytes,
            "choices": list(self.choices),
            "speculation": [dataclasses.asdict(part) for part in self.speculation],
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def to_html(self, path: str | Path, measured: Sequence[ScheduleRow] = ()) -> Path:
        """Write the timeline as one self-contained HTML file and return its path.

        Args:
            path: File to write.
            measured: Rows of a run, drawn below those of the schedule.

        Raises:
            ConfigError: If the file cannot be written; nothing of it is left then.
        """
        from sparda_compile.report.html import write_html

        title = f"sparda {self.phase} schedule"
        rows = {self.phase: measured} if measured else {}
        return write_html(path, title=title, schedules=[self], measured=rows)

    def to_chrome_trace(self, path: str | Path) -> Path:
        """Write a trace for chrome://tracing or Perfetto and return its path.

        Raises:
            ConfigError: If the file cannot be written; nothing of it is left then.
        """
        target = check_writable(path)
        names = [
            {"ph": "M", "pid": 0, "tid": tid, "name": "thread_name", "args": {"name": name}}
            for tid, name in enumerate(STREAM_NAMES)
        ]
        slices = [
            {
                "ph": "X",
                "pid": 0,
                "tid": row.stream,
                "name": row.op,
                "cat": "exposed" if row.exposed_us else "work",
                "ts": row.start_us,
                "dur": row.end_us - row.start_us,
                "args": {
                    "node": row.node,
                    "layer": row.layer,
                    "hbm_bytes": row.hbm_bytes,
                    "link_bytes": row.link_bytes,
                },
            }
            for row in self.rows
            if row.end_us > row.start_us
        ]
        with replacing(target) as partial:
            partial.write_text(json.dumps({"traceEvents": [*names, *slices]}))
        return target


def _shortened(op: str) -> str:
    return op if len(op) <= _OP_WIDTH else f"{op[: _OP_WIDTH - 3]}..."
