"""`sparda bench profile`: one decode step as it runs on this GPU, beside what was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

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
from sparda_compile.cli.options import (
    MOST_SEQUENCES,
    MOST_TOKENS,
    Commit,
    SelectingMode,
    ShapeOption,
)
from sparda_compile.cli.outputs import check_folder, write_file
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparda_compile.profiling.measured import MeasuredSchedule

__all__ = ["bench_profile"]

_ROOM: Final = 128  # tokens that the steps may add
_TRACE_STEPS: Final = 96


def bench_profile(
    shape: ShapeOption = "8b",
    batch: Annotated[int, typer.Option(min=1, max=MOST_SEQUENCES, help="Sequences.")] = 1,
    tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens per sequence.")
    ] = 131072,
    overlap: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of scored blocks that a step has in common with the one before.",
        ),
    ] = 0.9,
    mode: Annotated[SelectingMode, typer.Option(help="Who selects the blocks.")] = "forecast",
    nodes: Annotated[bool, typer.Option("--nodes", help="Print every node, not sums alone.")] = (
        False
    ),
    out: Annotated[
        Path, typer.Option(help="Folder for profile.json, profile.html and trace.json.")
    ] = Path("bench-results"),
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Measure one decode step node by node, beside its schedule."""
    with errors_as_sentences(bench_profile):
        _check(tokens, mode)
        check_folder(out)
        with progress() as say:
            say("importing torch and transformers")
            labs.require_gpu("sparda bench profile")
            trace = write_file(lambda path: path, out / "trace.json")
            assert trace is not None
            measured = _measure(shape, batch, tokens, overlap, mode, trace, say)
        what = {"shape": shape, "batch_size": batch, "max_tokens": tokens, "overlap": overlap}
        result = {**what, "mode": mode, **measured.to_dict()}
        written = [
            write_file(lambda path: _write_json(result, path, commit), out / "profile.json"),
            write_file(measured.to_html, out / "profile.html"),
            trace,
        ]
    if as_json:
        print_json(result)
        return
    from sparda_compile.cli.tables import print_measured

    print_measured(measured, make_console(), with_nodes=nodes)
    print_paths(written)


def _check(tokens: int, mode: SelectingMode) -> None:
    config = SpardaConfig(mode=mode, offload="auto")
    # A trace names other blocks in every step, beside those that are always read.
    scored = config.top_k or 0
    least = (config.sink_blocks + config.local_blocks + 2 * scored) * config.block_size + _ROOM
    if tokens % config.block_size or tokens < least:
        raise ConfigError(
            f"--tokens {tokens} is no whole number of blocks of {config.block_size} with room for "
            f"the steps; use a multiple of {config.block_size} from {least} on."
        )


def _measure(
    shape: str,
    batch: int,
    tokens: int,
    overlap: float,
    mode: str,
    trace: Path,
    say: Callable[[str], None],
) -> MeasuredSchedule:
    import torch

    from sparda_compile.bench.programs import build_program
    from sparda_compile.bench.shapes import SHAPES, build_model
    from sparda_compile.bench.synthetic import fill, follow, rewind
    from sparda_compile.profiling.measured import measure_step
    from sparda_compile.program.captures import Captures
    from sparda_compile.runtime.kv_cache import KVCache

    device = torch.device("cuda")
    say(f"building the {shape} model")
    captures = Captures(build_model(SHAPES[shape], device, torch.bfloat16), {})
    say("rewriting decode")
    program = build_program(
        captures, "scheduled", batch, tokens, _TRACE_STEPS, **_settings(mode, overlap)
    )
    start = tokens - _ROOM
    say("filling the KV cache")
    cache = KVCache(program.plan.layout, device)
    fill(cache, start)
    follow(cache, start, overlap)
    rewind(cache, start)
    ids = torch.zeros((batch, 1), dtype=torch.long, device=device)
    positions = torch.full_like(ids, start)
    say("compiling, capturing and profiling")
    return measure_step(lambda: program(ids, positions, None, cache), program.plan, trace=trace)


def _settings(mode: str, overlap: float) -> dict[str, Any]:
    """Return what a mode's program is made with, beside the sizes."""
    settings: dict[str, Any] = {"mode": mode, "expected_overlap": overlap}
    if mode == "exact":
        settings["expected_recall"] = 1.0  # the hint follows the trace, too
    if mode == "speculate":  # whether it pays or not: that is what is to be seen
        settings |= {"offload": "never", "speculate_where": "always"}
    return settings


def _write_json(result: dict[str, Any], path: Path, commit: str | None) -> Path:
    from sparda_compile.environment import write_result

    write_result(path, {"name": "profile", **result}, commit)
    return path
