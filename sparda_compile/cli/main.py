"""The command line: `version`, `inspect`, `demo`, `chat`, `train`, `eval`, `bench`, `calibrate`.

What a command finds goes to stdout, as tables or with `--json` as JSON alone; progress and errors
go to stderr. Exit codes:

    0    done
    1    the model cannot be rewritten, or the demo found a difference
    2    wrong usage, or a setting that is not allowed
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from sparda_compile import __version__
from sparda_compile.cli.bench import bench_app
from sparda_compile.cli.calibrate import calibrate_machine
from sparda_compile.cli.chat import chat
from sparda_compile.cli.console import AsJson, print_json
from sparda_compile.cli.demo import demo
from sparda_compile.cli.evaluations import eval_app
from sparda_compile.cli.inspect import inspect_model
from sparda_compile.cli.train import train_model

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command line."""
    app(prog_name="sparda")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparda {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    print_version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_print_version,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Long contexts on one GPU: sparse, offloaded, race-free decode."""


@app.command("version")
def show_version(as_json: AsJson = False) -> None:
    """Print the versions of this package and of what it stands on."""
    versions = {
        "sparda_compile": __version__,
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
    }
    if as_json:
        print_json(versions)
        return
    for name, number in versions.items():
        typer.echo(f"{name} {number}")


app.command("inspect")(inspect_model)
app.command("demo")(demo)
app.command("chat")(chat)
app.command("calibrate")(calibrate_machine)
app.command("train")(train_model)
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
