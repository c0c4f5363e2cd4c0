"""`sparda bench predict`: what the cost model says of steps that were measured, beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from sparda_compile.cli.console import (
    AsJson,
    errors_as_sentences,
    make_console,
    print_json,
    progress,
)

__all__ = ["bench_predict"]


def bench_predict(
    files: Annotated[
        list[Path],
        typer.Argument(help="Results of decode, budget or profile.", show_default=False),
    ],
    as_json: AsJson = False,
) -> None:
    """Predict the steps of result files again, beside what was measured; needs no GPU."""
    with errors_as_sentences(bench_predict):
        with progress() as say:
            say("importing torch and transformers")
            from sparda_compile.bench.predicted import Predictor, read_points

            points = [point for file in files for point in read_points(file)]
            predictor, found = Predictor(), []
            for point in points:
                say(f"{point.file}: {point.variant}, batch {point.batch_size}")
                found.append((point, predictor.step_us(point)))
        from sparda_compile.bench.predicted_show import print_predicted
    if as_json:
        rows = [
            {
                **dataclasses.asdict(point),
                "is_judged": point.is_judged,
                "predicted_us": round(us, 1),
            }
            for point, us in found
        ]
        print_json({"name": "predict", "points": rows})
        return
    print_predicted(found, make_console())
