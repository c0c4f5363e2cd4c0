"""What was found on texts, as tables and as a plot of perplexity against budget."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.cases import DENSE
from sparda_compile.evaluation.text.oracle import ORACLE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from sparda_compile.evaluation.text.intervals import Estimate
    from sparda_compile.evaluation.text.results import TextRow

__all__ = ["print_rows", "write_text_plot"]

_LOWEST: Final = "lowest %"
_TEXT_NOTE: Final = """\
In brackets 95% intervals over documents: a document is what was drawn, its tokens are not \
(Student's t over clusters; none for one document). read: blocks that a step reads, sink, local \
and current ones included. of dense: perplexity over that of the model itself on the same tokens. \
KL: nats, from the model's own predictions. top-1: predictions whose likeliest token is the \
model's. oracle: the blocks with most attention mass, which no selector knows without all keys."""
_ANSWER_NOTE: Final = """\
right: answers whose tokens are all the likeliest, with Wilson's 95% interval, in which all \
answers of one conversation count as one sample. more than dense: right answers less those of the \
model itself, in points, with Student's interval over trials or conversations. lowest: the depth \
or the question with the fewest right answers."""


def print_rows(rows: Sequence[TextRow], console: Console) -> None:
    """Print tables of perplexities and of answers, one for each length, where there are any."""
    texts = [row for row in rows if row.right is None]
    answers = [row for row in rows if row.right is not None]
    for made_by, found, note in (
        (_text_table, texts, _TEXT_NOTE),
        (_answer_table, answers, _ANSWER_NOTE),
    ):
        for length in dict.fromkeys(row.length for row in found):
            console.print(made_by([row for row in found if row.length == length]))
        if found:
            console.print(note, markup=False)


def write_text_plot(rows: Sequence[TextRow], path: Path) -> Path:
    """Draw perplexity against the share of blocks that are read, one panel a length.

    Args:
        rows: What was found; those of other tasks are not drawn.
        path: File to write; its ending says the format, such as .png or .svg.

    Raises:
        ConfigError: If there is no perplexity to draw.
    """
    from matplotlib.figure import Figure

    texts = [row for row in rows if row.task == "perplexity"]
    if not texts:
        raise ConfigError("a plot shows perplexity, which was not measured; add task perplexity.")
    lengths = list(dict.fromkeys(row.length for row in texts))
    figure = Figure(figsize=(5.5 * len(lengths), 4.5), layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False)
    for panel, length in zip(panels[0], lengths, strict=True):
        _draw(panel, length, [row for row in texts if row.length == length])
    figure.savefig(path, dpi=120)
    return path


def _text_table(rows: Sequence[TextRow]) -> Table:
    first = rows[0]
    title = f"{first.num_samples} documents, {first.length} tokens each, {first.tokens} predictions"
    table = _table(title, "perplexity", "of dense", "KL", "top-1")
    for row in rows:
        table.add_row(
            row.case,
            f"{100 * row.budget:.0f}%",
            f"{row.perplexity.value:.2f}",
            "" if row.case == DENSE else _interval(row.ratio, 1.0, 3),
            "" if row.case == DENSE else _interval(row.kl, 1.0, 3),
            "" if row.case == DENSE else _interval(row.top1, 100.0, 1),
        )
    return table


def _answer_table(rows: Sequence[TextRow]) -> Table:
    table = _table(
        f"Answers at {rows[0].length} tokens",
        "right %",
        "more than dense",
        "KL",
        _LOWEST,
        task=True,
    )
    for row in rows:
        assert row.right is not None
        assert row.right_gain is not None
        label, share = min(row.right_by_label.items(), key=lambda item: item[1])
        table.add_row(
            row.case,
            f"{row.task} ({row.num_samples})",
            f"{100 * row.budget:.0f}%",
            _interval(row.right, 100.0, 1),
            "" if row.case == DENSE else _interval(row.right_gain, 100.0, 1),
            "" if row.case == DENSE else f"{row.kl.value:.3f}",
            f"{label}: {100 * share:.0f}",
        )
    return table


def _table(title: str, *names: str, task: bool = False) -> Table:
    """Return a table whose first column alone, and the one of labels, may wrap."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("configuration")
    if task:
        table.add_column("task", no_wrap=True)
    for name in ("read", *names):
        table.add_column(name, justify="right", no_wrap=name != _LOWEST)
    return table


def _interval(estimate: Estimate, scale: float, digits: int) -> str:
    """Return `14.71 [13.20, 16.40]`; without an interval the number alone."""
    value, low, high = (
        f"{scale * each:.{digits}f}" for each in (estimate.value, estimate.low, estimate.high)
    )
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"


def _draw(panel: Any, length: int, rows: Sequence[TextRow]) -> None:
    documents = rows[0].num_samples
    panel.set(
        title=f"{length} tokens, {documents} documents",
        xlabel="blocks read (%)",
        ylabel="perplexity",
    )
    for row in rows:
        if row.case == DENSE:
            panel.axhline(row.perplexity.value, color="black", linewidth=1, label="dense")
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.mode != "dense":
            prompt = ", sparse prompt" if row.prefill == "sparse" else ""
            prompt += f" by {row.prefill_selector}" if row.prefill_selector else ""
            times = row.prefill_candidates
            prompt += f" of {times:g}x candidates" if times else ""
            hints = f" by {row.hints}" if row.hints else ""
            tail = "" if row.kv_format == "model" else f", {row.kv_format}"
            name = f"{row.mode} {row.selector}{hints}{tail}{prompt}"
            name = ORACLE if row.selector == ORACLE else name
            lines.setdefault(name, []).append((100 * row.budget, row.perplexity.value))
    for name, points in lines.items():
        budgets, values = zip(*sorted(points), strict=True)
        panel.plot(budgets, values, "--" if name == ORACLE else "-", marker="o", label=name)
    panel.legend(fontsize="small")
