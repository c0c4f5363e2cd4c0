"""The command line: `sparda version`, `sparda inspect`, `sparda demo`.

What a command finds goes to stdout, as tables or with `--json` as JSON alone; progress and errors
go to stderr. Exit codes:

    0    done
    1    the model cannot be rewritten, or the demo found a difference
    2    wrong usage, or a setting that is not allowed
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from sparda_compile import __version__
from sparda_compile.config import HINT_NAMES, MACHINE_NAMES, SELECTOR_NAMES, SpardaConfig, round_up
from sparda_compile.errors import ConfigError, SpardaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["app", "main"]

_CANNOT, _WRONG_USAGE = 1, 2
_ALL: Final = "all"
_WIDTH: Final = 110

app = typer.Typer(
    help="Long contexts on one GPU: sparse, offloaded, race-free decode.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]


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
        _print_json(versions)
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
    selector: Annotated[str, typer.Option(help=f"{' or '.join(SELECTOR_NAMES)}.")] = "infllm2",
    hint: Annotated[
        str, typer.Option(help=f"What exact prefetches by: {', '.join(HINT_NAMES)}.")
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
    with _errors_as_sentences():
        config = SpardaConfig(
            mode=mode,  # type: ignore[arg-type]
            selector=selector,
            hint=hint,
            top_k=_parse_top_k(top_k),
            machine=machine,
            offload=offload,  # type: ignore[arg-type]
        )
        with _progress() as say:
            say("importing torch and transformers")
            from sparda_compile.api import explain
            from sparda_compile.targets import build_target

            say(f"building {target}")
            model = build_target(target)
            say(f"tracing and rewriting {type(model).__name__}")
            max_tokens = round_up(tokens, config.block_size)
            report = explain(model, config, batch_size=batch, max_tokens=max_tokens)
        if as_json:
            _print_json(report.to_dict())
        if report.error:
            _fail(report.error, _CANNOT)
        decode = next((s for s in report.schedules if s.phase == "decode"), None)
        if trace is not None and decode is None:
            raise ConfigError(
                f"--trace {trace}: mode={mode!r} with offload={offload!r} has no decode schedule "
                "to trace; use a mode that offloads."
            )
        written = [_write(report.to_html, html or _default("sparda-report.html", as_json))]
        written.append(_write(decode.to_chrome_trace, trace) if decode else None)
    if not as_json:
        from sparda_compile.tables import print_report

        print_report(report, _console())
        _print_paths(written)


@app.command()
def demo(
    mode: Annotated[
        list[str] | None,
        typer.Option(help="Mode to run, may be given again. [default: all of them]"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Bytes of text to read.")] = 8192,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the model's random weights.")] = 0,
    html: Annotated[
        Path | None, typer.Option(help="HTML report to write. [default: sparda-demo.html]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a tiny random Llama in every mode on the CPU and compare it with the original."""
    with _errors_as_sentences():
        with _progress() as say:
            say("importing torch and transformers")
            from sparda_compile.demo import MODES, run_demo

            result = run_demo(
                modes=mode or MODES,
                num_tokens=tokens,
                new_tokens=new_tokens,
                seed=seed,
                progress=say,
            )
        written = _write(result.report.to_html, html or _default("sparda-demo.html", as_json))
    if as_json:
        _print_json(result.to_dict())
    else:
        from sparda_compile.tables import print_demo

        print_demo(result, _console())
        _print_paths([written])
    if result.mismatches:
        _fail("; ".join(result.mismatches) + ".", _CANNOT)


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


def _default(name: str, as_json: bool) -> Path | None:
    """Return the file to write when none was named: none beside JSON."""
    return None if as_json else Path(name)


def _write(write: Callable[[Path], Path], path: Path | None) -> Path | None:
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value))


def _print_paths(paths: list[Path | None]) -> None:
    for path in paths:
        if path is not None:
            typer.echo(f"Wrote {path}")


def _console(*, stderr: bool = False) -> Console:
    """Return a console; what is no terminal gets room enough for the tables."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def _fail(message: str, code: int) -> None:
    _console(stderr=True).print(f"Error: {message}", markup=False, style="red", soft_wrap=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def _errors_as_sentences() -> Iterator[None]:
    """Print the sentence of an error of ours, and nothing else, and exit."""
    try:
        yield
    except ConfigError as error:
        _fail(str(error), _WRONG_USAGE)
    except SpardaError as error:
        _fail(str(error), _CANNOT)


class _PassNames(logging.Handler):
    """Shows which pass ended last, on the status line."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.DEBUG)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        """Show the first words of a message: phase and pass."""
        self.show(record.getMessage().partition(":")[0])


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that says on stderr what is being done: a status line, or plain lines."""
    console = _console(stderr=True)
    if not console.is_terminal:
        yield lambda text: console.print(f"{text} ...", markup=False, style="dim")
        return
    current = ""
    with console.status("starting") as status:

        def say(text: str) -> None:
            nonlocal current
            current = text
            status.update(text)

        log = logging.getLogger("sparda_compile.passes")
        handler, level = _PassNames(lambda name: status.update(f"{current}: {name}")), log.level
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
        try:
            yield say
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
