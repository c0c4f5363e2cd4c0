"""`sparda bench prr`: what predict, reuse and repair gain in one layer of a decode step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from sparda_compile.cli import labs
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
from sparda_compile.cli.options import (
    MOST_MINUTES,
    MOST_SEQUENCES,
    MOST_TOKENS,
    Commit,
    OutFolder,
    Shape,
)
from sparda_compile.cli.outputs import check_folder
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparda_compile.bench.prr import PrrBench, PrrSetting
    from sparda_compile.bench.suite import Part

__all__ = ["bench_prr", "prr_part"]

_MINUTES: Final = 9.0
# Blocks of 64: sink, local, current, one that is empty, and twice the scored ones.
_BLOCK: Final = 64
_LEAST_TOKENS: Final = 10240


def bench_prr(
    shape: Annotated[
        list[Shape] | None,
        typer.Option(help="Model, may be given again.", show_default="8b, 8b-8kv"),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=MOST_TOKENS,
            help="Tokens per sequence, may be given again; they are measured in this order.",
            show_default="128K, 512K, 64K, 16K",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=MOST_SEQUENCES,
            help="Sequences, may be given again; they are measured in this order.",
            show_default="1, 16, 4",
        ),
    ] = None,
    coverage: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of the selected blocks that is predicted, may be given again.",
            show_default="0.7, 0.9, 0.98, 1",
        ),
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0, max=MOST_MINUTES, help="Time for everything.")
    ] = _MINUTES,
    out: OutFolder = Path("bench-results"),
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Measure one layer's selection and attention, with and without speculation."""
    with errors_as_sentences(bench_prr):
        with progress() as say:
            say("importing torch")
            setting = _setting(shape, tokens, batch, coverage)
            check_folder(out)
            labs.require_gpu("sparda bench prr")
            bench = _bench(setting, out, commit, say)
            parts = bench.run(minutes)
        from sparda_compile.bench.prr_show import print_prr
        from sparda_compile.bench.show import print_parts
    if as_json:
        print_json(bench.file.content())
    else:
        print_prr(bench.file.results, make_console())
        print_parts(parts, make_console())
        print_paths([bench.file.path])
    failed = [part["name"] for part in parts if part["status"] == "failed"]
    if failed:
        fail(f"{', '.join(failed)} failed; see above.", CANNOT)


def prr_part(out: Path, commit: str | None, say: Callable[[str], None]) -> Part:
    """Return the part of `sparda bench all`: the default of the command.

    Args:
        out: Folder of the results.
        commit: To note.
        say: Told what is going on.
    """
    from sparda_compile.bench.prr import PrrSetting
    from sparda_compile.bench.suite import Part

    def run() -> None:
        parts = _bench(PrrSetting(), out, commit, say).run(_MINUTES)
        failed = [part["name"] for part in parts if part["status"] == "failed"]
        if failed:
            raise RuntimeError(f"{', '.join(failed)} failed")

    def is_done() -> bool:
        return _bench(PrrSetting(), out, commit, say).is_done()

    return Part("prr", _MINUTES, is_done, run)


def _setting(
    shape: list[Shape] | None,
    tokens: list[int] | None,
    batch: list[int] | None,
    coverage: list[float] | None,
) -> PrrSetting:
    """Return a checked setting."""
    from sparda_compile.bench.prr import PrrSetting
    from sparda_compile.bench.prr_layer import LayerSetting

    for each in tokens or ():
        if each % _BLOCK or each < _LEAST_TOKENS:
            raise ConfigError(
                f"--tokens {each} is no whole number of blocks, or too few to choose from; use a "
                f"multiple of {_BLOCK} from {_LEAST_TOKENS} on."
            )
    usual = PrrSetting()
    coverages = tuple(dict.fromkeys(coverage or usual.layer.coverages))
    return PrrSetting(
        tuple(dict.fromkeys(map(str, shape or usual.shapes))),
        tuple(dict.fromkeys(tokens or usual.tokens)),
        tuple(dict.fromkeys(batch or usual.batches)),
        LayerSetting(coverages=coverages),
    )


def _bench(
    setting: PrrSetting, out: Path, commit: str | None, say: Callable[[str], None]
) -> PrrBench:
    import torch

    from sparda_compile.bench.prr import PrrBench
    from sparda_compile.bench.result_file import ResultFile

    file = ResultFile(out / "prr.json", setting.head, "part", commit)
    return PrrBench(setting, file, torch.device("cuda"), say)
