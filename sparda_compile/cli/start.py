"""`sparda bench start`: what a user waits for before tokens come, in fresh processes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sparda_compile.cli.console import (
    CANNOT,
    AsJson,
    errors_as_sentences,
    fail,
    make_console,
    print_json,
    print_paths,
    progress,
)
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from sparda_compile.bench.start_child import Job

__all__ = ["bench_start"]

_TINY_LAYERS: Final = 32


def bench_start(
    shape: Annotated[str, typer.Option(help="Model to make: 8b, 8b-8kv or tiny.")] = "8b",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers. [default: the shape's own; tiny: 32]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu. [default: cuda if there is one]")
    ] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            help="Sequences x tokens of a prompt, such as 4x1024, may be given again; they run in "
            "this order. [default: six on a GPU, four on a CPU]"
        ),
    ] = None,
    mode: Annotated[str, typer.Option(help="dense, query, forecast or exact.")] = "forecast",
    lowering: Annotated[
        str, typer.Option(help="inductor, or eager, which compiles nothing.")
    ] = "inductor",
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Measure transformers' caches too.")
    ] = True,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for each process.")] = 1800.0,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file.")] = Path("bench-results"),
    commit: Annotated[
        str | None, typer.Option(help="Commit to note, where this is no git checkout.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what comes before the first tokens: imports, rewriting, compiling; cold and warm."""
    with errors_as_sentences():
        with progress() as say:
            say("importing torch")
            from sparda_compile.bench.lab import ResultFile
            from sparda_compile.bench.start import measure_start, plan_runs

            job = _job(shape, layers, device, scenario, mode, lowering)
            path = out / f"start-{job.device}-{shape}.json"
            file = ResultFile(path, _head(job), "run", commit)
            runs = plan_runs(job.device, with_baselines=baseline)
            rows = measure_start(job, runs, timeout, file.save, say)
        from sparda_compile.bench.show import print_start
    if as_json:
        print_json(file.content())
    else:
        print_start(rows, make_console())
        print_paths([file.path])
    failed = [row["run"] for row in rows if "failed" in row]
    if failed:
        fail(f"{', '.join(failed)} failed; what was found before is in {file.path}.", CANNOT)


def _job(
    shape: str,
    layers: int | None,
    device: str | None,
    scenario: list[str] | None,
    mode: str,
    lowering: str,
) -> Job:
    """Return a checked job; each process gets its own program."""
    import torch

    from sparda_compile.bench.shapes import SHAPES
    from sparda_compile.bench.start import DEFAULT_SCENARIOS
    from sparda_compile.bench.start_child import Job, Scenario
    from sparda_compile.config import SpardaConfig

    if shape not in SHAPES:
        raise ConfigError(f"--shape {shape} is not known; use one of {', '.join(SHAPES)}.")
    SpardaConfig(mode=mode, lowering=lowering)  # type: ignore[arg-type]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in DEFAULT_SCENARIOS:
        raise ConfigError(f"--device {device} is not known; use cuda or cpu.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device cuda needs a CUDA GPU, and torch {torch.__version__} sees none; use "
            "--device cpu, or run it on a machine with one."
        )
    scenarios = tuple(str(Scenario.parse(s)) for s in scenario or DEFAULT_SCENARIOS[device])
    own = _TINY_LAYERS if shape == "tiny" else SHAPES[shape].num_layers
    return Job("", shape, layers or own, device, mode, lowering, scenarios)


def _head(job: Job) -> dict[str, Any]:
    """Return what tells this measurement from others in the file's place."""
    fields = dataclasses.asdict(job)
    del fields["program"]
    dtype = "bfloat16" if job.device == "cuda" else "float32"
    head = {"name": "start", **fields, "dtype": dtype, "num_cores": os.cpu_count()}
    return head | {"scenarios": list(job.scenarios)}
