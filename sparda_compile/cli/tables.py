"""The tables that the command line prints: a report, the demo, and a measured step."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparda_compile.demo.table import table_of
from sparda_compile.isa.streams import STREAM_NAMES
from sparda_compile.report.text import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import Console

    from sparda_compile.demo.needles import NeedleDemo
    from sparda_compile.demo.run import Demo
    from sparda_compile.profiling.measured import MeasuredSchedule, Times
    from sparda_compile.profiling.replay import Totals
    from sparda_compile.report import Report, SiteSummary
    from sparda_compile.report.schedule import Schedule

__all__ = ["format_layers", "print_demo", "print_measured", "print_report"]

_LAYER_NUMBER = re.compile(r"\.\d+\.")

_MEASURED_NOTES = """\
model: all that is not ours, which the compiler fuses as it likes. wait_blocks: the time that the \
compute stream stood still for another. overlap: share of the copy stream's work that lies under \
compute; of early attention, of the attend stream's. The profiler makes a step longer; without it \
one takes {step}."""
_TOTALS: tuple[tuple[str, str, Callable[[Totals], float]], ...] = (
    ("step", " us", lambda totals: totals.step_us),
    ("compute stream busy", " us", lambda totals: totals.compute_us),
    ("copy stream busy", " us", lambda totals: totals.copy_us),
    ("select stream busy", " us", lambda totals: totals.select_us),
    ("attend stream busy", " us", lambda totals: totals.attend_us),
    ("compute waits for others", " us", lambda totals: totals.exposed_us),
    ("overlap", "%", lambda totals: 100 * totals.overlap),
    ("overlap of early attention", "%", lambda totals: 100 * totals.attend_overlap),
)


def print_report(report: Report, console: Console) -> None:
    """Print what `explain` found: sites, planned bytes, passes, schedules."""
    console.print(
        f"{report.model}, mode {report.mode}: {len(report.sparse_sites)} attentions rewritten, "
        f"{len(report.dense_sites)} left dense",
        style="bold",
    )
    console.print(_sites(report.sites))
    for reason, layers in _reasons(report).items():
        console.print(f"Layers {format_layers(layers)} stay dense: {reason}.", markup=False)
    console.print(_bytes(report))
    console.print(report.selection, markup=False)
    if report.speculation:
        console.print(report.speculation, markup=False)
    console.print(_passes(report))
    if report.schedules:
        console.print(_schedules(report.schedules))
        for schedule in report.schedules:
            if schedule.speculation:
                console.print(_speculation(schedule))


def print_demo(demo: Demo | NeedleDemo, console: Console) -> None:
    """Print the comparison of modes and what to make of it."""
    shown = table_of(demo)
    for line in shown.before:
        console.print(line, markup=False, highlight=False)
    table = _table(shown.title, shown.columns, left=shown.num_text)
    for cells, is_wrong in zip(shown.rows, shown.wrong, strict=True):
        table.add_row(*cells, style="red" if is_wrong else None)
    console.print(table)
    for note in shown.notes:
        console.print(note, markup=False)


def print_measured(
    measured: MeasuredSchedule, console: Console, *, with_nodes: bool = False
) -> None:
    """Print a step as predicted and as measured: totals, ops, layers and, if wanted, nodes."""
    schedule = measured.schedule
    table = _table(
        f"One {schedule.phase} step on {measured.device}, predicted for {schedule.machine}",
        ("", "predicted", "measured", "difference"),
        left=1,
    )
    for name, unit, value in _TOTALS:
        planned, found = value(measured.predicted), value(measured.measured)
        table.add_row(
            name,
            *(f"{each:.1f}{unit}" for each in (planned, found)),
            f"{found - planned:+.1f}{unit}",
        )
    console.print(table)
    console.print(_times("Per op, microseconds", "op", measured.ops()))
    if measured.speculation():
        console.print(_times("Speculation, microseconds", "part", measured.speculation()))
    for stream, name in enumerate(STREAM_NAMES):
        title = f"Per layer on the {name} stream, microseconds; waits are left out"
        console.print(_times(title, "layer", measured.layers(stream)))
    if with_nodes:
        console.print(_times("Per node, microseconds", "node", measured.each_node()))
    step = "an unknown time" if measured.step_us is None else f"{measured.step_us:.1f} us"
    console.print(_MEASURED_NOTES.format(step=step), markup=False)


def _times(title: str, what: str, entries: Sequence[Times]) -> Table:
    table = _table(title, (what, "nodes", "predicted", "measured", "difference"), left=1)
    for each in entries:
        name = "none" if what == "layer" and each.name == "-1" else each.name
        numbers = (f"{each.predicted_us:.1f}", f"{each.measured_us:.1f}")
        table.add_row(name, str(each.count), *numbers, f"{each.difference_us:+.1f}")
    return table


def format_layers(layers: Iterable[int]) -> str:
    """Return layer numbers as ranges: `0-4, 6`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _table(title: str, columns: Sequence[str], *, left: int) -> Table:
    """Return an empty table whose first `left` columns are text and the others numbers.

    On a narrow terminal headings break between words alone, and long cells go on in a next line.
    """
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, column in enumerate(columns):
        table.add_column(
            column,
            justify="left" if i < left else "right",
            overflow="fold",
            min_width=max(map(len, column.split()), default=0),
        )
    return table


def _sites(sites: Iterable[SiteSummary]) -> Table:
    """Return the attentions; those that differ in nothing but their layer share a row."""
    names = (
        "layers",
        "becomes",
        "form",
        "heads",
        "KV heads",
        "head dim",
        "scale",
        "soft cap",
        "position",
        "module",
    )
    layers: dict[tuple[str, ...], list[int]] = {}
    for site in sites:
        cells: tuple[str, ...] = (
            "sparse" if site.kind == "sparse" else "dense",
            site.form,
            str(site.num_heads),
            str(site.num_groups),
            str(site.head_dim),
            f"{site.scale:.4g}",
            f"{site.softcap:g}" if site.softcap else "",
            site.position,
            _LAYER_NUMBER.sub(".*.", site.module),
        )
        layers.setdefault(cells, []).append(site.layer)
    rows = [(format_layers(numbers), *same) for same, numbers in layers.items()]
    # A column without a word is left out: few models have a soft cap.
    used = [i for i in range(len(names)) if not rows or any(row[i] for row in rows)]
    table = _table("Attentions", [names[i] for i in used], left=len(used))
    for row in rows:
        table.add_row(*(row[i] for i in used))
    return table


def _reasons(report: Report) -> dict[str, list[int]]:
    """Return the layers that stay dense, by reason."""
    layers: dict[str, list[int]] = {}
    for site in report.dense_sites:
        layers.setdefault(site.reason, []).append(site.layer)
    return layers


def _bytes(report: Report) -> Table:
    table = _table(
        f"KV cache planned for {report.batch_size} x {report.max_tokens} tokens",
        ("what", "where", "bytes"),
        left=2,
    )
    parts = (
        ("all blocks", "CPU memory", report.host_bytes),
        ("pages", "device", sum(layer.page_bytes for layer in report.layers)),
        ("summaries", "device", sum(layer.summary_bytes for layer in report.layers)),
        ("tables", "device", sum(layer.table_bytes for layer in report.layers)),
    )
    for what, where, num_bytes in parts:
        table.add_row(what, where, format_bytes(num_bytes))
    if report.forecast_parameters:
        share = 100 * report.forecast_parameters / max(report.model_parameters, 1)
        count = f"{report.forecast_parameters:,} weights"
        table.add_row("Forecast", "device", f"{count}, {share:.2f}% of the model")
    return table


def _passes(report: Report) -> Table:
    table = _table("Passes", ("phase", "pass", "counts", "nodes", "ms"), left=3)
    for entry in report.passes:
        counts = ", ".join(f"{value} {name}" for name, value in entry.counts.items() if value)
        table.add_row(
            entry.phase,
            entry.name,
            counts or "nothing to do",
            f"{entry.nodes_before} -> {entry.nodes_after}",
            f"{entry.ms:.0f}",
        )
    return table


def _schedules(schedules: Sequence[Schedule]) -> Table:
    table = _table(
        f"One step as predicted for {schedules[0].machine}; nothing was measured",
        ("phase", "step us", "copies in line us", "exposed us", "over the link"),
        left=1,
    )
    for schedule in schedules:
        table.add_row(
            schedule.phase,
            f"{schedule.total_us:.0f}",
            f"{schedule.baseline_us:.0f}",
            f"{schedule.exposed_us:.0f}",
            format_bytes(schedule.link_bytes),
        )
    return table


def _speculation(schedule: Schedule) -> Table:
    table = _table(
        f"Speculation in one {schedule.phase} step, predicted",
        ("part", "stream", "layers", "us in all", "beside others"),
        left=2,
    )
    for part in schedule.speculation:
        hidden = "" if part.stream == STREAM_NAMES[0] else f"{part.hidden_us:.1f}"
        table.add_row(part.name, part.stream, str(part.num_layers), f"{part.us:.1f}", hidden)
    return table
