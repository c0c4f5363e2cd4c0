"""`sparda calibrate`: measure the constants that the scheduler plans with."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from sparda_compile.cli.bench import require_gpu
from sparda_compile.cli.console import (
    AsJson,
    errors_as_sentences,
    make_console,
    print_json,
    print_paths,
    progress,
)
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
    with errors_as_sentences():
        require_gpu("sparda calibrate")
        from sparda_compile.bench.calibration import measure_machine, write_machine
        from sparda_compile.bench.show import print_machine

        with progress() as say:
            machine = measure_machine(say)
        path = None
        if not print_only:
            try:
                path = write_machine(machine, commit)
            except OSError as error:
                raise ConfigError(
                    f"the constants cannot be written ({error.strerror}: {error.filename}); set "
                    "XDG_CACHE_HOME to a folder that can, or use --print-only."
                ) from error
    if as_json:
        print_json({"machine": dataclasses.asdict(machine), "file": str(path) if path else None})
        return
    print_machine(machine, make_console())
    print_paths([path])
