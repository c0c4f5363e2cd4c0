"""The command line: `version`, `inspect`, `demo`, `train`, `eval`, `bench` and `calibrate`.

What a command finds goes to stdout, as tables or with `--json` as JSON alone; progress and errors
go to stderr. Exit codes:

    0    done
    1    the model cannot be rewritten, or the demo found a difference
    2    wrong usage, or a setting that is not allowed
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from sparda_compile import __version__
from sparda_compile.cli.bench import bench_app
from sparda_compile.cli.calibrate import calibrate_machine
from sparda_compile.cli.console import (
    CANNOT,
    AsJson,
    errors_as_sentences,
    fail,
    make_console,
    print_json,
    print_paths,
    progress,
    write_file,
)
from sparda_compile.cli.evaluate import evaluate_model
from sparda_compile.cli.train import train_model
from sparda_compile.config import MACHINE_NAMES, SpardaConfig, round_up
from sparda_compile.errors import ConfigError
from sparda_compile.registry import HINTS, SELECTORS

if TYPE_CHECKING:
    from sparda_compile.demo.needles import NeedleDemo
    from sparda_compile.demo.run import Demo
    from sparda_compile.report.model import Report

__all__ = ["app", "main"]

_ALL: Final = "all"

app = typer.Typer(
    help="Long contexts on one GPU: sparse, offloaded, race-free decode.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app(prog_name="sparda")


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


@app.command("inspect")
def inspect_model(
    target: Annotated[
        str,
        typer.Argument(
            help="A model type of transformers (llama: its default configuration), a folder with "
            "a config.json, or a tiny model (tiny-llama). Weights are never read."
        ),
    ],
    mode: Annotated[str, typer.Option(help="dense, query, forecast or exact.")] = "forecast",
    selector: Annotated[str, typer.Option(help=f"{' or '.join(SELECTORS.choices())}.")] = "infllm2",
    hint: Annotated[
        str, typer.Option(help=f"What exact prefetches by: {', '.join(HINTS.choices())}.")
    ] = "forecast",
    top_k: Annotated[
        str, typer.Option(help="Blocks to pick beyond sink and local ones, or 'all'.")
    ] = "62",
    batch: Annotated[int, typer.Option(min=1, help="Sequences to plan for.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per sequence to plan for.")] = 32768,
    machine: Annotated[
        str, typer.Option(help=f"Whose constants predict times: {' or '.join(MACHINE_NAMES)}.")
    ] = "h200",
    offload: Annotated[str, typer.Option(help="always, never or auto.")] = "always",
    html: Annotated[
        Path | None, typer.Option(help="HTML report to write. [default: sparda-report.html]")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Chrome trace of the decode schedule to write.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what `optimize` would do to a model, without running it."""
    with errors_as_sentences():
        config = SpardaConfig(
            mode=mode,  # type: ignore[arg-type]
            selector=selector,
            hint=hint,
            top_k=_parse_top_k(top_k),
            machine=machine,
            offload=offload,  # type: ignore[arg-type]
        )
        with progress() as say:
            say("importing torch and transformers")
            from sparda_compile.api import explain
            from sparda_compile.cli.targets import build_target

            say(f"building {target}")
            model = build_target(target)
            say(f"tracing and rewriting {type(model).__name__}")
            max_tokens = round_up(tokens, config.block_size)
            report = explain(model, config, batch_size=batch, max_tokens=max_tokens)
        if as_json:
            print_json(report.to_dict())
        if report.error:
            fail(report.error, CANNOT)
        html = html or _default("sparda-report.html", as_json)
        written = _write_report(report, config, html, trace)
    if not as_json:
        from sparda_compile.cli.tables import print_report

        print_report(report, make_console())
        print_paths(written)


@app.command()
def demo(
    mode: Annotated[
        list[str] | None,
        typer.Option(help="Mode to run, may be given again. [default: all of them]"),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="small: the shipped model finds needles in a haystack; random: a tiny random "
            "Llama is compared with the original."
        ),
    ] = "small",
    tokens: Annotated[
        int | None, typer.Option(min=64, help="Tokens to read. [default: 16448; random: 8192]")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens that the random model generates.")
    ] = 24,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the haystack, or of the random weights.")
    ] = 0,
    html: Annotated[
        Path | None, typer.Option(help="HTML report to write. [default: sparda-demo.html]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a small model in every mode on the CPU: what is right, what is equal, what moves."""
    with errors_as_sentences():
        if model not in ("small", "random"):
            raise ConfigError(f"--model {model} is not known; use small or random.")
        result: Demo | NeedleDemo
        with progress() as say:
            say("importing torch and transformers")
            if model == "small":
                from sparda_compile.demo.needles import run_shipped_model

                result = run_shipped_model(modes=mode, num_tokens=tokens, seed=seed, progress=say)
            else:
                from sparda_compile.demo.run import MODES, run_demo

                result = run_demo(
                    modes=mode or MODES,
                    num_tokens=tokens or 8192,
                    new_tokens=new_tokens,
                    seed=seed,
                    progress=say,
                )
        from sparda_compile.demo.table import write_demo

        html = html or _default("sparda-demo.html", as_json)
        written = write_file(lambda path: write_demo(result, path), html)
    if as_json:
        print_json(result.to_dict())
    else:
        from sparda_compile.cli.tables import print_demo

        print_demo(result, make_console())
        print_paths([written])
    if result.mismatches:
        fail("; ".join(result.mismatches) + ".", CANNOT)


app.command("calibrate")(calibrate_machine)
app.command("train")(train_model)
app.command("eval")(evaluate_model)
app.add_typer(bench_app, name="bench")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _parse_top_k(text: str) -> int | None:
    if text == _ALL:
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"--top-k {text} is no number; pass one, or 'all' for every block."
        ) from None


def _write_report(
    report: Report, config: SpardaConfig, html: Path | None, trace: Path | None
) -> list[Path | None]:
    """Write what was asked for of a report: a page, and the trace of the decode schedule."""
    decode = next((s for s in report.schedules if s.phase == "decode"), None)
    if trace is not None and decode is None:
        raise ConfigError(
            f"--trace {trace}: mode={config.mode!r} with offload={config.offload!r} has no decode "
            "schedule to trace; use a mode that offloads."
        )
    written = [write_file(report.to_html, html)]
    return [*written, write_file(decode.to_chrome_trace, trace) if decode else None]


def _default(name: str, as_json: bool) -> Path | None:
    """Return the file to write when none was named: none beside JSON."""
    return None if as_json else Path(name)
