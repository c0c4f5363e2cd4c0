"""The demo's result as a table: the same on the terminal and on its page."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sparda_compile.report.html import write_html
from sparda_compile.report.text import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from sparda_compile.demo.needles import NeedleDemo, NeedleRow
    from sparda_compile.demo.run import Demo, DemoRow

__all__ = ["DemoTable", "table_of", "write_demo"]

_DEMO_NOTES = """\
blocks: of all blocks, those that a step reads for each KV head. agree: new tokens that are the \
original's. With all blocks read it has to be 100%; with a small budget a model with random \
weights goes its own way, which is no measure of quality. on device: device memory of the KV \
cache, tables and summaries included, against all keys and values. Times are of the reference \
runtime on one CPU thread with lowering="eager", where nothing overlaps."""
_NEEDLE_NOTES = """\
blocks: of all blocks, those that a step reads for each KV head. recall: of the attention that the \
questions pay beyond sink and local blocks, what falls on the blocks picked. over the link: bytes \
copied to the device by all steps; modes dense and speculate keep everything there. on device: \
device memory of the KV cache, tables and summaries included. Times are of the reference \
runtime on the CPU with lowering="eager", where nothing overlaps."""
_FRESH_FORECAST = """\
The Forecast weights are not trained: they start from the mean of each group's query heads."""


@dataclasses.dataclass(frozen=True)
class DemoTable:
    """What is shown of a demo.

    Attributes:
        before: Lines before the table: what was read and asked.
        title: Title of the table.
        columns: Names of its columns.
        num_text: The first so many columns hold text, the others numbers.
        rows: Cells of each mode.
        wrong: Whether a row is not what it has to be.
        notes: What the columns mean.
    """

    before: tuple[str, ...]
    title: str
    columns: tuple[str, ...]
    num_text: int
    rows: tuple[tuple[str, ...], ...]
    wrong: tuple[bool, ...]
    notes: tuple[str, ...]


def table_of(demo: Demo | NeedleDemo) -> DemoTable:
    """Return what is shown of a demo."""
    from sparda_compile.demo.needles import NeedleDemo

    return _needle_table(demo) if isinstance(demo, NeedleDemo) else _demo_table(demo)


def write_demo(demo: Demo | NeedleDemo, path: str | Path) -> Path:
    """Write the table, and what was done to the model in the last mode, as one HTML page.

    Raises:
        ConfigError: If the file cannot be written; nothing of it is left then.
    """
    report = demo.report
    return write_html(
        path,
        title=f"sparda demo: {report.model}",
        schedules=report.schedules,
        report=report,
        demo=dataclasses.asdict(table_of(demo)),
    )


def _demo_table(demo: Demo) -> DemoTable:
    notes = [_DEMO_NOTES]
    if demo.used_fresh_forecast:
        notes.append(_FRESH_FORECAST)
    notes.append(
        f"The model was traced {demo.num_captures} times (prefill, decode) for all modes together."
    )
    return DemoTable(
        before=(),
        title=(
            f"{demo.num_tokens} bytes of text read, {demo.new_tokens} tokens written; all keys and "
            f"values: {format_bytes(demo.rows[0].full_bytes)}"
        ),
        columns=(
            "mode",
            "blocks",
            "agree",
            "hits",
            "misses",
            "H2D",
            "D2H",
            "on device",
            "prefill",
            "per token",
        ),
        num_text=1,
        rows=tuple(map(_demo_cells, demo.rows)),
        wrong=tuple(not row.is_right for row in demo.rows),
        notes=tuple(notes),
    )


def _needle_table(demo: NeedleDemo) -> DemoTable:
    asked = zip(demo.questions, demo.right_answers, demo.places, strict=True)
    return DemoTable(
        before=(
            f"{demo.num_tokens} tokens read once by the original model, in "
            f"{demo.reading_ms / 1e3:.1f} s; 4 of the 32 needles in them are asked for:",
            *(f"  {key}: {value}, at token {place}" for key, value, place in asked),
        ),
        title="",
        columns=(
            "mode",
            "found",
            "answers",
            "blocks",
            "recall",
            "over the link",
            "per step",
            "on device",
            "per token",
        ),
        num_text=3,
        rows=tuple(map(_needle_cells, demo.rows)),
        wrong=tuple(row.answers != demo.right_answers for row in demo.rows),
        notes=(_NEEDLE_NOTES,),
    )


def _needle_cells(row: NeedleRow) -> tuple[str, ...]:
    return (
        row.mode,
        f"{row.num_right} of {len(row.answers)}",
        " ".join(row.answers),
        f"{row.blocks}/{row.num_blocks}",
        "" if row.recall is None else f"{100 * row.recall:.0f}%",
        format_bytes(row.h2d_bytes),
        format_bytes(row.step_bytes),
        format_bytes(row.device_bytes),
        f"{row.token_ms:.0f} ms",
    )


def _demo_cells(row: DemoRow) -> tuple[str, ...]:
    return (
        row.mode,
        f"{row.blocks}/{row.num_blocks}",
        f"{100 * row.agreement:.0f}%",
        "" if row.hit_rate is None else f"{100 * row.hit_rate:.0f}%",
        "" if row.misses is None else str(row.misses),
        "" if row.h2d_bytes is None else format_bytes(row.h2d_bytes),
        "" if row.d2h_bytes is None else format_bytes(row.d2h_bytes),
        f"{100 * row.device_bytes / row.full_bytes:.0f}%",
        f"{row.prefill_ms:.0f} ms",
        f"{row.token_ms:.1f} ms",
    )
