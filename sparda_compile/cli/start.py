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
from sparda_compile.cli.devices import find_device
from sparda_compile.cli.options import (
    MOST_MINUTES,
    Commit,
    Device,
    Lowering,
    Mode,
    Shape,
    ShapeOption,
)
from sparda_compile.cli.outputs import check_folder

if TYPE_CHECKING:
    from sparda_compile.bench.start_child import Job

__all__ = ["bench_start"]

_TINY_LAYERS: Final = 32
_MOST_LAYERS: Final = 1024

Layers = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=_MOST_LAYERS,
        help="Layers.",
        show_default=f"the shape's own; tiny: {_TINY_LAYERS}",
    ),
]
DeviceOption = Annotated[
    Device | None,
    typer.Option(help="Device to run on.", show_default="cuda if there is one"),
]
Scenarios = Annotated[
    list[str] | None,
    typer.Option(
        help="Sequences x tokens of a prompt, such as 4x1024, may be given again; they run in this "
        "order.",
        show_default="six on a GPU, four on a CPU",
    ),
]


def bench_start(
    shape: ShapeOption = "8b",
    layers: Layers = None,
    device: DeviceOption = None,
    scenario: Scenarios = None,
    mode: Annotated[Mode, typer.Option(help="Who selects the blocks.")] = "forecast",
    lowering: Annotated[
        Lowering, typer.Option(help="How programs are made; eager compiles nothing.")
    ] = "inductor",
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Measure transformers' caches too.")
    ] = True,
    timeout: Annotated[
        float, typer.Option(min=1, max=60 * MOST_MINUTES, help="Seconds for each process.")
    ] = 1800.0,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file.")] = Path("bench-results"),
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Measure what comes before the first tokens: imports, rewriting, compiling; cold and warm."""
    with errors_as_sentences(bench_start):
        with progress() as say:
            say("importing torch")
            from sparda_compile.bench.result_file import ResultFile
            from sparda_compile.bench.start import measure_start, plan_runs

            job = _job(shape, layers, device, scenario, mode, lowering)
            check_folder(out)
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
    shape: Shape,
    layers: int | None,
    device: Device | None,
    scenario: list[str] | None,
    mode: Mode,
    lowering: Lowering,
) -> Job:
    """Return a checked job; each process gets its own program."""
    import torch

    from sparda_compile.bench.shapes import SHAPES
    from sparda_compile.bench.start import DEFAULT_SCENARIOS
    from sparda_compile.bench.start_child import Job, Scenario

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    find_device(device)
    scenarios = tuple(str(Scenario.parse(s)) for s in scenario or DEFAULT_SCENARIOS[device])
    own = _TINY_LAYERS if shape == "tiny" else SHAPES[shape].num_layers
    return Job("", str(shape), layers or own, str(device), str(mode), str(lowering), scenarios)


def _head(job: Job) -> dict[str, Any]:
    """Return what tells this measurement from others in the file's place."""
    fields = dataclasses.asdict(job)
    del fields["program"]
    dtype = "bfloat16" if job.device == "cuda" else "float32"
    head = {"name": "start", **fields, "dtype": dtype, "num_cores": os.cpu_count()}
    return head | {"scenarios": list(job.scenarios)}
