"""What speculation takes in a step: a line for each of its parts, on the stream where it runs.

speculation           attend   attention to predicted blocks, before any is selected
repair and removal    compute  attention to the blocks that were missed, and the merge, which
                               takes in no block that was predicted in vain
next prediction       attend   this step's scores into the levels, then the blocks of the next
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from sparda_compile.isa.streams import STREAM_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparda_compile.report.schedule import ScheduleRow

__all__ = ["PARTS", "SpeculationPart", "speculation_parts"]

PARTS: Final = {
    "speculation": ("sparda.attend_predicted",),
    "repair and removal": ("sparda.repair_predicted",),
    "next prediction": ("sparda.update_prediction", "sparda.predict_ahead"),
}
"""Ops of each part, by its name."""


@dataclasses.dataclass(frozen=True)
class SpeculationPart:
    """What one part takes, over all layers.

    Attributes:
        name: Of the part, as in `PARTS`.
        stream: Name of the stream that it runs on.
        num_layers: Layers that have it.
        us: Time in all, microseconds.
        hidden_us: Of that, what lies beside work of other streams; 0 on the compute stream.
    """

    name: str
    stream: str
    num_layers: int
    us: float
    hidden_us: float


def speculation_parts(rows: Sequence[ScheduleRow]) -> list[SpeculationPart]:
    """Return the parts of a step, in the order of `PARTS`; none where nothing is speculated.

    Args:
        rows: A timeline, predicted or measured; a part of a layer may be several of them.
    """
    found = []
    for name, ops in PARTS.items():
        mine = [row for row in rows if row.op in ops]
        if not mine:
            continue
        stream = mine[0].stream
        others = [row for row in rows if row.stream != stream and not row.exposed_us]
        found.append(
            SpeculationPart(
                name=name,
                stream=STREAM_NAMES[stream],
                num_layers=len({row.layer for row in mine}),
                us=sum(row.end_us - row.start_us for row in mine),
                hidden_us=_beside(mine, others) if stream else 0.0,
            )
        )
    return found


def _beside(rows: Sequence[ScheduleRow], others: Sequence[ScheduleRow]) -> float:
    """Return for how long rows of one stream run while one of the others does, microseconds."""
    total, others = 0.0, sorted(others, key=lambda each: each.start_us)
    for row in rows:
        until = row.start_us
        for other in others:
            start, end = max(other.start_us, until), min(other.end_us, row.end_us)
            if end > start:
                total, until = total + end - start, end
    return total
