"""Predicted beside measured, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparda_compile.bench.predicted import EXACT_SINCE, SINCE
from sparda_compile.bench.show import make_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from sparda_compile.bench.predicted import Point

__all__ = ["print_predicted"]


def print_predicted(points: Sequence[tuple[Point, float]], console: Console) -> None:
    """Print a row for each point, and how far apart both times are at most.

    Args:
        points: Each with its predicted time, microseconds.
        console: Where to.
    """
    columns = ("file", "program", "mode", "batch", "overlap", "predicted", "measured", "ratio")
    table = make_table("Milliseconds of one step", columns, 3)
    ratios = []
    for point, us in points:
        ratio = "-"
        if point.is_judged:
            ratios.append(us / point.measured_us)
            ratio = f"{ratios[-1]:.3f}"
        table.add_row(
            point.file.removesuffix(".json"),
            f"{point.shape} {point.variant}",
            point.mode,
            str(point.batch_size),
            f"{point.overlap:g}",
            f"{us / 1e3:.3f}",
            f"{point.measured_us / 1e3:.3f}",
            ratio,
        )
    console.print(table)
    if ratios:
        told = f"{len(ratios)} points, from {min(ratios):.3f} to {max(ratios):.3f} of measured."
        console.print(told, markup=False)
    console.print(
        f"Without a ratio: measured before {SINCE}, in mode exact before {EXACT_SINCE}.",
        markup=False,
    )
