"""What `sparda train` prints in the end: a summary, or JSON with every step."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import typer

from sparda_compile.cli.console import print_json, print_paths
from sparda_compile.cli.train_data import DocumentBatches
from sparda_compile.cli.train_lines import TrainingLines, share_in_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from torch import Tensor

    from sparda_compile.forecast.weights import ForecastWeights
    from sparda_compile.training.report import HeldOutReport, StepReport

__all__ = ["show_training"]


def show_training(
    out: Path,
    weights: ForecastWeights,
    lines: TrainingLines,
    data: DocumentBatches | Iterable[Tensor],
    tp: int,
    *,
    as_json: bool,
) -> None:
    """Show what was trained; of several processes, the first one does.

    Args:
        out: The file of weights.
        weights: What it holds.
        lines: What steps and measurements saw.
        data: What was learned from.
        tp: Processes that share a replica.
        as_json: Whether to print JSON.
    """
    from sparda_compile.training.parallel import rank_of_environment, world_of_environment

    if rank_of_environment():
        return
    if as_json:
        documents = data.plain() if isinstance(data, DocumentBatches) else None
        ran = {"out": str(out), "processes": world_of_environment(), "tp": tp}
        print_json({**ran, "documents": documents, **_found(weights, lines)})
        return
    typer.echo(_summary(lines.reports))
    if lines.measures:
        typer.echo(f"held-out documents: {_change(lines.measures)}")
    print_paths([out])


def _found(weights: ForecastWeights, lines: TrainingLines) -> dict[str, Any]:
    """Return what was trained and what each step and measurement saw, as plain data."""
    from sparda_compile.training.report import tokens_per_s

    assert weights.info is not None
    described = json.loads(weights.info.to_json())
    steps = [
        _described(report)
        | {
            "gradient_norm": report.gradient_norm,
            "num_tokens": report.num_tokens,
            "seconds": report.seconds,
            "tokens_per_s": report.tokens_per_s,
        }
        for report in lines.reports
    ]
    measures = [_described(report) for report in lines.measures]
    rate = tokens_per_s(lines.reports)
    return {"forecast": described, "tokens_per_s": rate, "steps": steps, "held_out": measures}


def _summary(reports: Sequence[StepReport]) -> str:
    from sparda_compile.training.report import tokens_per_s

    return f"{_change(reports)}, {tokens_per_s(reports):.0f} tokens/s"


def _change(reports: Sequence[StepReport] | Sequence[HeldOutReport]) -> str:
    first, last = reports[0], reports[-1]
    return (
        f"loss {first.loss:.4f} -> {last.loss:.4f}, recall {share_in_words(first.recall)} -> "
        f"{share_in_words(last.recall)}"
    )


def _described(report: StepReport | HeldOutReport) -> dict[str, Any]:
    def known(numbers: dict[int, float]) -> dict[str, float | None]:
        return {str(layer): _number(value) for layer, value in numbers.items()}

    return {
        "step": report.step,
        "loss": report.loss,
        "recall": _number(report.recall),
        "losses": known(report.losses),
        "recalls": known(report.recalls),
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
