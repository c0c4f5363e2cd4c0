"""`sparda bench tradeoff`: tokens per second against perplexity, of formats and budgets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparda_compile.cli.console import (
    AsJson,
    errors_as_sentences,
    make_console,
    print_json,
    print_paths,
)
from sparda_compile.cli.options import MOST_SEQUENCES
from sparda_compile.cli.outputs import check_plot, write_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from sparda_compile.bench.tradeoff import TradeoffPoint

__all__ = ["bench_tradeoff"]

DecodeFiles = Annotated[
    list[Path],
    typer.Option(
        "--decode", help="JSON file of `sparda bench decode`, one a format. May be given again."
    ),
]
TextResult = Annotated[
    Path, typer.Option("--text", help="JSON file of `sparda eval text` with the same formats.")
]


def bench_tradeoff(
    decode: DecodeFiles,
    text: TextResult,
    batch: Annotated[int, typer.Option(min=1, max=MOST_SEQUENCES, help="Sequences.")] = 16,
    overlap: Annotated[float, typer.Option(min=0.0, max=1.0, help="As for decode.")] = 0.7,
    plot: Annotated[Path | None, typer.Option(help="Plot to write, such as formats.png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Join speeds with perplexities: what each format of full blocks costs and gains."""
    with errors_as_sentences(bench_tradeoff):
        from sparda_compile.bench.tradeoff import draw_tradeoff, join, read_result

        check_plot(plot)
        decoded = [read_result(path, "decode") for path in decode]
        points = join(decoded, read_result(text, "eval_text"), batch, overlap)
        title = f"{batch} sequences, overlap {overlap:g}"
        written = write_file(lambda path: draw_tradeoff(points, path, title), plot)
    if as_json:
        print_json({"name": "tradeoff", "points": [dataclasses.asdict(p) for p in points]})
        return
    make_console().print(_table(points, title))
    print_paths([written])


def _table(points: Sequence[TradeoffPoint], title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=f"Formats of full blocks: {title}", box=SIMPLE_HEAD, padding=(0, 1))
    for column in ("selector", "format"):
        table.add_column(column, no_wrap=True)
    for column in ("read", "tokens/s", "perplexity", "of dense", "KL"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            point.selector,
            point.kv_format,
            f"{100 * point.read:.0f}%",
            f"{point.tokens_per_s:.1f}",
            f"{point.perplexity:.2f}",
            f"{point.ratio:.3f}",
            f"{point.kl:.3f}",
        )
    return table
