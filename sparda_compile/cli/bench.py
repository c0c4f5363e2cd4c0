"""`sparda bench`: what decode costs on this GPU, beside everything that a user could do instead."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sparda_compile.cli import labs
from sparda_compile.cli.bench_files import budget_file, decode_file, kernels_file
from sparda_compile.cli.compile_ahead import bench_compile
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
from sparda_compile.cli.decode import bench_decode, decode_setting
from sparda_compile.cli.options import (
    MOST_GIB,
    MOST_MINUTES,
    Commit,
    HostGib,
    KvFormat,
    OutFolder,
    Rounds,
    ShapeOption,
    Steps,
    Tokens,
)
from sparda_compile.cli.outputs import check_folder
from sparda_compile.cli.predict import bench_predict
from sparda_compile.cli.profile import bench_profile
from sparda_compile.cli.prompts import bench_prefill, bench_turns, prompt_part
from sparda_compile.cli.prr import bench_prr, prr_part
from sparda_compile.cli.start import bench_start
from sparda_compile.cli.tradeoff import bench_tradeoff
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparda_compile.bench.lab import Lab
    from sparda_compile.bench.result_file import ResultFile
    from sparda_compile.bench.suite import Part

__all__ = ["bench_app"]

_BUDGETS: Final = (8.0, 16.0)
_TOKENS: Final = 131072
_KERNEL_MINUTES: Final = 4.0
_BUDGET_MINUTES: Final = 5.0

bench_app = typer.Typer(help="Measure decode, prompts and kernels on a GPU.", no_args_is_help=True)
bench_app.command("predict")(bench_predict)
bench_app.command("profile")(bench_profile)
bench_app.command("start")(bench_start)
bench_app.command("prefill")(bench_prefill)
bench_app.command("turns")(bench_turns)
bench_app.command("prr")(bench_prr)
bench_app.command("tradeoff")(bench_tradeoff)
bench_app.command("compile")(bench_compile)
bench_app.command("decode")(bench_decode)

Format = Annotated[KvFormat, typer.Option(help="How full blocks are written.")]


@bench_app.command("budget")
def bench_budget(
    shape: ShapeOption = "8b",
    gib: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            max=MOST_GIB,
            help="Device memory for KV, GiB, may be given again.",
            show_default=", ".join(f"{gib:g}" for gib in _BUDGETS),
        ),
    ] = None,
    tokens: Tokens = _TOKENS,
    overlap: Annotated[
        list[float] | None,
        typer.Option(min=0.0, max=1.0, help="As for decode.", show_default="0.9"),
    ] = None,
    kv_format: Format = "model",
    rounds: Rounds = 3,
    steps: Steps = 20,
    out: OutFolder = Path("bench-results"),
    max_host_gib: HostGib = None,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Spend the same device memory on KV in two ways: resident, and offloaded."""
    with errors_as_sentences(bench_budget):
        budgets = gib or _BUDGETS
        if min(budgets) <= 0:
            raise ConfigError(f"--gib {min(budgets):g} is too small; use more than 0.")
        with progress() as say:
            say("importing torch and transformers")
            formats = {"kv_format": str(kv_format)}
            setting = decode_setting(1, tokens, overlap or [0.9], None, rounds, steps, formats)
            check_folder(out)
            labs.require_gpu("sparda bench budget")
            lab = labs.make_lab(shape, say, max_host_gib)
            file = budget_file(out, shape, tokens, commit, formats)
            for size in budgets:
                lab.budget(size, setting, file.save)
        from sparda_compile.bench.show import print_budget
    if as_json:
        print_json(file.content())
        return
    print_budget(file.results, make_console())
    print_paths([file.path])


@bench_app.command("kernels")
def bench_kernels(
    out: OutFolder = Path("bench-results"), commit: Commit = None, as_json: AsJson = False
) -> None:
    """Measure the kernels alone, beside their floors and what else could do the same."""
    with errors_as_sentences(bench_kernels):
        check_folder(out)
        labs.require_gpu("sparda bench kernels")
        with progress() as say:
            result = _measure_kernels(out / "kernels.json", commit, say)
        from sparda_compile.bench.show import print_kernels
    if as_json:
        print_json(result)
        return
    print_kernels(result, make_console())
    print_paths([out / "kernels.json"])


@bench_app.command("all")
def bench_all(
    out: OutFolder = Path("bench-results"),
    minutes: Annotated[
        float, typer.Option(min=0, max=MOST_MINUTES, help="Time for everything.")
    ] = 120.0,
    max_host_gib: HostGib = None,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Run everything, the most important part first, and stop before the time is over."""
    with errors_as_sentences(bench_all):
        check_folder(out)
        labs.require_gpu("sparda bench all")
        with progress() as say:
            from sparda_compile.bench.suite import run_parts
            from sparda_compile.environment import write_result

            parts = _parts(out, commit, say, max_host_gib)
            found = run_parts(
                parts,
                minutes,
                say,
                lambda done: write_result(out / "all.json", {"name": "all", "parts": done}, commit),
            )
        from sparda_compile.bench.show import print_parts
    if as_json:
        print_json({"name": "all", "parts": found})
    else:
        print_parts(found, make_console())
        print_paths([*sorted(out.glob("*.json"))])
    failed = [part["name"] for part in found if part["status"] == "failed"]
    if failed:
        fail(f"{', '.join(failed)} failed; see above, and run it alone.", CANNOT)


def _parts(
    out: Path, commit: str | None, say: Callable[[str], None], max_host_gib: float | None
) -> list[Part]:
    """Return the parts of `all`, in order of importance; one model is held at a time."""
    from sparda_compile.bench.memory import free_everything
    from sparda_compile.bench.suite import PARTS, WITH_BASELINES, Part

    made: dict[str, Lab] = {}

    def lab(shape: str) -> Lab:
        if shape not in made:
            made.clear()
            free_everything()
            made[shape] = labs.make_lab(shape, say, max_host_gib)
        return made[shape]

    def decode(shape: str, batch: int) -> None:
        setting = decode_setting(batch, _TOKENS, None, None, 3, 20)
        save = decode_file(out, shape, _TOKENS, commit).save
        lab(shape).decode(setting, save, with_baselines=(shape, batch) == WITH_BASELINES)

    def budget(gib: float) -> None:
        setting = decode_setting(1, _TOKENS, [0.9], None, 3, 20)
        lab("8b").budget(gib, setting, budget_file(out, "8b", _TOKENS, commit).save)

    kernels = out / "kernels.json"
    parts = [
        Part(
            "kernels",
            _KERNEL_MINUTES,
            lambda: bool(kernels_file(kernels, commit).results),
            lambda: _measure_kernels(kernels, commit, say),
        ),
        prr_part(out, commit, say),
    ]
    for what, shape, size, minutes in PARTS:
        if what != "decode":
            parts.append(prompt_part(what, shape, size, minutes, (out, commit), lab))
            continue
        is_done = partial(_has, decode_file, out, shape, commit, size)
        run = partial(decode, shape, size)
        parts.append(Part(f"decode {shape} batch {size}", minutes, is_done, run))
    for gib in _BUDGETS:
        is_done = partial(_has, budget_file, out, "8b", commit, gib)
        parts.append(Part(f"budget {gib:g} GiB", _BUDGET_MINUTES, is_done, partial(budget, gib)))
    return parts


def _has(
    file: Callable[..., ResultFile], out: Path, shape: str, commit: str | None, key: float
) -> bool:
    return file(out, shape, _TOKENS, commit).has(key)


def _measure_kernels(path: Path, commit: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    from sparda_compile.bench.kernels import bench_kernels as measure

    result = measure(say)
    kernels_file(path, commit).save({"part": "kernels", **result})
    return result
