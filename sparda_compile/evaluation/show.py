"""An evaluation as a table and as a plot."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparda_compile.errors import BackendUnavailableError
from sparda_compile.evaluation.metrics import ORACLE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from sparda_compile.evaluation.guesses import Guess
    from sparda_compile.evaluation.run import Evaluation, EvaluationRow, Recall

__all__ = ["print_evaluation", "write_plot"]

_ROWS_NOTE: Final = """\
budget: of all blocks, those that a step may read, sink and local ones included. right: sequences \
with every answer right, with Wilson's 95% interval. KL (nats) and top-1: at the answers, against \
the dense model fed with the same tokens."""
_RECALL_NOTE: Final = """\
Every row of this table has the same budget for each who chose. Blocks that are always read (sink, \
local, current) count in it and are left out of both recalls. mass: of the attention to the other \
blocks, what falls on those found; blocks: of the true query's blocks, those found. In brackets \
the 95% interval of a bootstrap over sequences."""
_GUESS_NOTE: Final = """\
named: blocks that a guess names over those that a step chooses by score; always-read ones come on \
top, and are left out of the rest. coverage: of the blocks read, those guessed; precision: of the \
blocks guessed, those read; fetched: blocks guessed that the step before did not read, over those \
read; lowest: coverage of the layer where it is lowest, and that layer."""


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print a table of the configurations, and one of who found what.

    Args:
        evaluation: What `evaluate` found.
        console: Where to print.
    """
    console.print(_row_table(evaluation))
    console.print(_ROWS_NOTE, markup=False)
    rows = _with_recalls(evaluation.rows)
    if rows:
        console.print(_recall_table(rows))
        console.print(_RECALL_NOTE, markup=False)
    if any(row.guesses for row in rows):
        console.print(_guess_table(rows))
        console.print(_GUESS_NOTE, markup=False)


def write_plot(evaluation: Evaluation, path: Path) -> Path:
    """Draw accuracy against budget, and recall by layer, into a file.

    Args:
        evaluation: What `evaluate` found.
        path: File to write; its ending says the format, such as .png or .svg.

    Raises:
        BackendUnavailableError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailableError(
            "a plot needs matplotlib, which is not installed; install sparda-compile[plot], or "
            "write JSON instead."
        ) from error
    tasks = list(dict.fromkeys(row.task for row in evaluation.rows))
    figure = Figure(figsize=(4.5 * len(tasks), 7.0), layout="constrained")
    panels = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        rows = [row for row in evaluation.rows if row.task == task]
        _draw_accuracy(panels[0, column], task, rows)
        _draw_recalls(panels[1, column], rows)
    figure.savefig(path, dpi=120)
    return path


def _row_table(evaluation: Evaluation) -> Table:
    first = evaluation.rows[0]
    table = Table(title=f"{evaluation.model}, {first.num_samples} sequences each", box=SIMPLE_HEAD)
    names = ("configuration", "task", "tokens", "budget", "right", "KL", "top-1")
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if place < 2 else "right")
    for row in evaluation.rows:
        table.add_row(
            row.name,
            row.task,
            str(row.length),
            f"{100 * row.budget:.0f}%",
            _interval(row.accuracy, row.low, row.high),
            f"{row.kl:.3f}",
            f"{100 * row.agreement:.1f}%",
        )
    return table


def _recall_table(rows: Sequence[EvaluationRow]) -> Table:
    table = Table(title="Who found the blocks, in the layers where everyone chose", box=SIMPLE_HEAD)
    names = ("configuration", "task", "tokens", "budget", "chosen by", "mass", "blocks")
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if place in (0, 1, 4) else "right")
    for row in rows:
        for recall in _overall(row):
            table.add_row(
                row.name,
                row.task,
                str(row.length),
                f"{100 * row.budget:.0f}%",
                recall.name,
                _interval(recall.mass, recall.mass_low, recall.mass_high),
                _interval(recall.blocks, recall.blocks_low, recall.blocks_high),
            )
    return table


def _guess_table(rows: Sequence[EvaluationRow]) -> Table:
    table = Table(title="Who guessed the blocks before the step", box=SIMPLE_HEAD)
    names = ("configuration", "task", "tokens", "guessed by", "named")
    for place, name in enumerate((*names, "coverage", "precision", "fetched", "lowest")):
        table.add_column(name, justify="left" if place in (0, 1, 3) else "right")
    for row in rows:
        for guess in (guess for guess in row.guesses if guess.layer is None):
            shares = (guess.coverage, guess.precision, guess.fetched)
            table.add_row(
                row.name,
                row.task,
                str(row.length),
                guess.name,
                f"{guess.budget:g}x",
                *map(_percent, shares),
                _lowest(row.guesses, guess),
            )
    return table


def _lowest(guesses: Sequence[Guess], of_all: Guess) -> str:
    """Return the lowest coverage that a guess has in a layer, and which layer that is."""
    same = (of_all.name, of_all.budget)
    found = [
        (guess.coverage, guess.layer)
        for guess in guesses
        if (guess.name, guess.budget) == same and guess.layer is not None
        if not math.isnan(guess.coverage)
    ]
    if not found:
        return "-"
    coverage, layer = min(found)
    return f"{_percent(coverage)} ({layer})"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}%"


def _with_recalls(rows: Sequence[EvaluationRow]) -> list[EvaluationRow]:
    """Return one row for each task, length and budget: the first that has recalls."""
    first: dict[tuple[str, int, float, str, str], EvaluationRow] = {}
    for row in rows:
        if row.recalls:
            read = (row.budget, row.selector, row.kv_format)
            first.setdefault((row.task, row.length, *read), row)
    return list(first.values())


def _overall(row: EvaluationRow) -> list[Recall]:
    return [recall for recall in row.recalls if recall.layer is None]


def _interval(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def _draw_accuracy(panel: Any, task: str, rows: Sequence[EvaluationRow]) -> None:
    curves = [(r.mode, r.selector, r.kv_format, r.length) for r in rows]
    for curve in dict.fromkeys(curves):
        same = [r for r, of in zip(rows, curves, strict=True) if of == curve]
        mode, selector, kv_format, length = curve
        points = sorted((100 * r.budget, 100 * r.accuracy, 100 * r.low, 100 * r.high) for r in same)
        budgets, values, lows, highs = zip(*points, strict=True)
        errors = [
            [value - low for value, low in zip(values, lows, strict=True)],
            [high - value for value, high in zip(values, highs, strict=True)],
        ]
        name = mode if selector == "infllm2" or mode == "dense" else f"{mode}, {selector}"
        name = name if kv_format == "model" else f"{name}, {kv_format}"
        panel.errorbar(
            budgets, values, yerr=errors, marker="o", capsize=3, label=f"{name} {length}"
        )
    panel.set(title=task, xlabel="blocks read (%)", ylabel="right (%)", ylim=(-2, 102))
    panel.legend(fontsize="small")


def _draw_recalls(panel: Any, rows: Sequence[EvaluationRow]) -> None:
    row = next(iter(_with_recalls(rows)), None)
    panel.set(xlabel="layer", ylabel="recall of attention mass (%)", ylim=(-2, 102))
    if row is None:
        return
    panel.set_title(f"{row.length} tokens, {100 * row.budget:.0f}% of the blocks", fontsize="small")
    for name in dict.fromkeys(recall.name for recall in row.recalls):
        layers = [r for r in row.recalls if r.name == name and r.layer is not None]
        style = "--" if name == ORACLE else "-"
        panel.plot(
            [r.layer for r in layers], [100 * r.mass for r in layers], style, marker="o", label=name
        )
    panel.legend(fontsize="small")
