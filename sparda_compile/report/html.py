"""The inspection page: one self-contained HTML file that draws itself from embedded JSON.

The page loads nothing: its style and script are in `template.html`, its content is one JSON
value. Graph texts are stored as runs of line numbers into a table that holds each distinct line
once, since a pass leaves most lines as they were.

    graphs.lines   ["%a = ...", "%b = ...", "%c = ..."]
    graphs.texts   [[0, 2], [0, 1, 2, 1]]            runs of (first line, count)
    passes         [{"before": 0, "after": 1, "changes": [[1, 2, 1, 2]], ...}]
"""

from __future__ import annotations

import dataclasses
import difflib
import html
import itertools
import json
import string
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.files import check_writable, replacing
from sparda_compile.isa.streams import COMPUTE, SELECT, STREAM_NAMES
from sparda_compile.report.schedule import ScheduleRow

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from sparda_compile.report.model import PassSummary, Report
    from sparda_compile.report.schedule import Schedule

__all__ = ["write_html"]

_ROW_FIELDS: Final = tuple(field.name for field in dataclasses.fields(ScheduleRow))


def write_html(
    path: str | Path,
    *,
    title: str,
    schedules: Sequence[Schedule],
    report: Report | None = None,
    measured: Mapping[str, Sequence[ScheduleRow]] | None = None,
    demo: Mapping[str, Any] | None = None,
) -> Path:
    """Write schedules, and a report if there is one, as one self-contained HTML file.

    Args:
        path: File to write; folders that are missing are made.
        title: Title of the page.
        schedules: Schedules to draw, in this order.
        report: What `explain` found. Without it the page shows the schedules alone. Its own
            schedules are not drawn.
        measured: Rows of runs, by phase; drawn below the schedule of that phase. Their bytes are
            not shown.
        demo: A comparison of modes to show first: texts `title`, `before` and `notes`, names of
            `columns`, of which the first `num_text` hold text, `rows` of cells, and whether each
            is `wrong`.

    Returns:
        The path.

    Raises:
        ConfigError: If the file cannot be written; nothing of it is left then.
        ValueError: If a number is infinite or not a number, which JSON cannot hold.
    """
    target = check_writable(path)
    template = resources.files("sparda_compile.report").joinpath("template.html")
    payload = _payload(title, schedules, report, measured or {}) | {"demo": demo}
    page = _Page(template.read_text(encoding="utf-8")).substitute(
        title=html.escape(title), payload=_embed(payload)
    )
    with replacing(target) as partial:
        partial.write_text(page, encoding="ascii", errors="xmlcharrefreplace")
    return target


class _Page(string.Template):
    """A template whose marks, `@@title` and `@@payload`, occur in no CSS and no JavaScript."""

    delimiter = "@@"


class _GraphTexts:
    """Interns graph texts, and the lines of these texts."""

    def __init__(self) -> None:
        self._line_ids: dict[str, int] = {}
        self._text_ids: dict[str, int] = {}
        self._texts: list[list[int]] = []

    def add(self, text: str) -> int:
        """Return the index of a text, storing it if it is new."""
        if text not in self._text_ids:
            self._text_ids[text] = len(self._texts)
            ids = [self._line_ids.setdefault(x, len(self._line_ids)) for x in text.split("\n")]
            self._texts.append(ids)
        return self._text_ids[text]

    def changes(self, before: int, after: int) -> list[tuple[int, int, int, int]]:
        """Return what differs, as (first, end) lines of one text and (first, end) of the other."""
        matcher = difflib.SequenceMatcher(None, self._texts[before], self._texts[after])
        return [(a, b, c, d) for tag, a, b, c, d in matcher.get_opcodes() if tag != "equal"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        texts = [list(itertools.chain.from_iterable(_runs(ids))) for ids in self._texts]
        return {"lines": list(self._line_ids), "texts": texts}


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of each stretch of consecutive numbers."""
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or ids[end] != ids[end - 1] + 1:
            yield ids[start], end - start
            start = end


def _streams(schedules: Sequence[Schedule]) -> tuple[str, ...]:
    """Return the names of the streams that have a lane: the usual ones, and any that is used."""
    used = (row.stream for schedule in schedules for row in schedule.rows)
    return STREAM_NAMES[: max(*used, SELECT, COMPUTE) + 1]


def _payload(
    title: str,
    schedules: Sequence[Schedule],
    report: Report | None,
    measured: Mapping[str, Sequence[ScheduleRow]],
) -> dict[str, Any]:
    texts = _GraphTexts()
    return {
        "title": title,
        "row_fields": _ROW_FIELDS,
        "streams": _streams(schedules),
        "schedules": [_plain_schedule(schedule) for schedule in schedules],
        "measured": {
            phase: [list(dataclasses.asdict(row).values()) for row in rows]
            for phase, rows in measured.items()
        },
        "report": _plain_report(report, texts) if report else None,
        "graphs": texts.to_dict(),
    }


def _plain_schedule(schedule: Schedule) -> dict[str, Any]:
    plain = schedule.to_dict()
    plain["rows"] = [list(row.values()) for row in plain["rows"]]
    return plain


def _plain_report(report: Report, texts: _GraphTexts) -> dict[str, Any]:
    plain = dataclasses.replace(report, schedules=()).to_dict()
    del plain["schedules"]
    for entry, summary in zip(plain["passes"], report.passes, strict=True):
        entry.update(_plain_graphs(summary, texts))
    return plain


def _plain_graphs(summary: PassSummary, texts: _GraphTexts) -> dict[str, Any]:
    before, after = texts.add(summary.before), texts.add(summary.after)
    return {"before": before, "after": after, "changes": texts.changes(before, after)}


def _embed(payload: dict[str, Any]) -> str:
    """Return JSON that no text inside it can break out of a script element with."""
    text = json.dumps(payload, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
