"""`sparda calibrate`: measure the constants that the scheduler plans with."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from sparda_compile.cli import labs
from sparda_compile.cli.console import (
    AsJson,
    errors_as_sentences,
    make_console,
    print_json,
    print_paths,
    progress,
)
from sparda_compile.cli.outputs import check_folder
from sparda_compile.errors import ConfigError

__all__ = ["calibrate_machine"]


def calibrate_machine(
    print_only: Annotated[
        bool, typer.Option("--print-only", help="Print the constants; write nothing.")
    ] = False,
    commit: Annotated[
        str | None, typer.Option(help="Commit to note, where this is no git checkout.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this GPU and its link, and keep the constants for every later plan."""
    with errors_as_sentences(calibrate_machine):
        labs.require_gpu("sparda calibrate")
        from sparda_compile.bench.calibration import measure_machine, write_machine
        from sparda_compile.bench.show import print_machine

        if not print_only:
            _check_cache()
        with progress() as say:
            machine = measure_machine(say)
        path = None if print_only else write_machine(machine, commit)
    if as_json:
        print_json({"machine": dataclasses.asdict(machine), "file": str(path) if path else None})
        return
    print_machine(machine, make_console())
    print_paths([path])


def _check_cache() -> None:
    """Find out now, not after the measurement, whether its result can be kept."""
    import torch

    from sparda_compile.passes.machine import calibration_file

    folder = calibration_file(torch.cuda.get_device_name()).parent
    try:
        check_folder(folder, "the constants' folder")
    except ConfigError as error:
        raise ConfigError(
            f"{folder} cannot be written; set XDG_CACHE_HOME to a folder that can, or use "
            "--print-only."
        ) from error
