"""`sparda bench decode`: what a step costs, of several batches, overlaps and formats of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import typer

from sparda_compile.cli import labs
from sparda_compile.cli.bench_files import decode_file, trace_file
from sparda_compile.cli.console import (
    AsJson,
    errors_as_sentences,
    make_console,
    print_json,
    print_paths,
    progress,
)
from sparda_compile.cli.options import (
    MOST_BLOCKS,
    MOST_SEQUENCES,
    Commit,
    Hint,
    HostGib,
    KvFormat,
    OffloadingMode,
    OutFolder,
    PageFormat,
    Rounds,
    Selector,
    ShapeOption,
    Steps,
    Tokens,
    Variant,
)
from sparda_compile.cli.outputs import check_folder, check_plot, write_file
from sparda_compile.cli.ranks import NumRanks, decode_on_ranks
from sparda_compile.cli.trace_options import Copies, TraceCases, TraceOption, read_traces
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sparda_compile.bench.decode import DecodeSetting
    from sparda_compile.bench.lab import Lab
    from sparda_compile.bench.result_file import ResultFile
    from sparda_compile.cli.trace_options import FollowedTraces

__all__ = ["bench_decode", "decode_setting"]

_OVERLAPS: Final = (0.5, 0.7, 0.9, 0.97)
_TOKENS: Final = 131072
# Room for sink, local and twice the scored blocks, so that a step can leave those of another out.
_LEAST_TOKENS: Final = 10176
# Tokens, overlaps, variants, rounds and steps.
_Asked: TypeAlias = tuple[int, list[float] | None, list[Variant] | None, int, int]

Batches = Annotated[
    list[int] | None,
    typer.Option(
        min=1, max=MOST_SEQUENCES, help="Sequences, may be given again.", show_default="1"
    ),
]
Overlaps = Annotated[
    list[float] | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share of scored blocks that a step has in common with the one before, may be given "
        "again.",
        show_default=", ".join(map(str, _OVERLAPS)),
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(min=0, max=MOST_BLOCKS, help="Blocks to pick by score.", show_default="as usual"),
]
PageRatio = Annotated[
    float | None,
    typer.Option(
        min=1.0,
        max=MOST_BLOCKS,
        help="Pages over selected blocks: more pages keep blocks for longer.",
        show_default="as usual",
    ),
]
Pages = Annotated[PageFormat, typer.Option(help="What pages hold of full blocks.")]
Formats = Annotated[
    list[KvFormat] | None,
    typer.Option(
        help="How full blocks are written, may be given again: one after another, a file each.",
        show_default="model",
    ),
]
OneSelector = Annotated[
    Selector | None,
    typer.Option(help="Who scores, and what steps keep of keys.", show_default="as usual"),
]
Modes = Annotated[
    list[OffloadingMode] | None,
    typer.Option(
        help="Who selects the blocks, may be given again: one after another, a file each.",
        show_default="forecast",
    ),
]
Hints = Annotated[
    list[Hint] | None,
    typer.Option(
        help="Hint of mode exact, may be given again: they add up.", show_default="as usual"
    ),
]
Variants = Annotated[
    list[Variant] | None,
    typer.Option(help="Program, may be given again.", show_default="all of them"),
]


def bench_decode(
    context: typer.Context,
    shape: ShapeOption = "8b",
    batch: Batches = None,
    tokens: Tokens = _TOKENS,
    overlap: Overlaps = None,
    variant: Variants = None,
    mode: Modes = None,
    hint: Hints = None,
    kv_format: Formats = None,
    page_format: Pages = "model",
    selector: OneSelector = None,
    top_k: TopK = None,
    page_ratio: PageRatio = None,
    rounds: Rounds = 3,
    steps: Steps = 20,
    trace: TraceOption = None,
    trace_case: TraceCases = None,
    copies: Copies = None,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Measure transformers' caches too.")
    ] = True,
    out: OutFolder = Path("bench-results"),
    plot: Annotated[Path | None, typer.Option(help="Plot to write, such as decode.png.")] = None,
    max_host_gib: HostGib = None,
    tp: NumRanks = 1,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Measure decode of one token: programs interleaved, outputs compared first."""
    with errors_as_sentences(bench_decode):
        with progress() as say:
            say("importing torch and transformers")
            formats = [str(name) for name in kv_format or ("model",)]
            pages = {"page_format": str(page_format), "page_ratio": page_ratio}
            chosen: dict[str, Any] = {**pages, "top_k": top_k, "selector": selector}
            _check(formats, chosen, trace is not None, tp, plot)
            modes = _modes(mode, hint, tp, plot)
            each = [own | {"kv_format": name} for own in modes for name in formats]
            asked = (tokens, overlap, variant, rounds, steps)
            groups = _settings(each, chosen, batch or (1,), asked)
            followed = read_traces(trace, trace_case or (), copies, tp)
            if followed:
                groups = [[followed.setting(s, overlap or ()) for s in group] for group in groups]
            check_plot(plot)
            check_folder(out)
            if tp == 1:
                labs.require_gpu("sparda bench decode")
                lab = labs.make_lab(shape, say, max_host_gib)
                place = (out, shape, tokens, commit)
                files = [_measure(lab, group, place, followed, baseline) for group in groups]
        if tp > 1:
            found = decode_on_ranks(context, shape, groups[0], (out, commit), tp)
            if found is None:  # one of the ranks: it has written what it found
                return
            files = [found]
    _show(files, plot, as_json=as_json)


def _show(files: Sequence[ResultFile], plot: Path | None, *, as_json: bool) -> None:
    """Write the plot, if one is asked for, and print what was measured."""
    from sparda_compile.bench.plots import write_plot
    from sparda_compile.bench.show import print_decode

    written = write_file(lambda path: write_plot(files[0].content(), path), plot)
    if as_json:
        contents = [file.content() for file in files]
        print_json(contents[0] if len(files) == 1 else {"name": "decode", "formats": contents})
        return
    for file in files:
        print_decode(file.results, make_console())
    print_paths([*(file.path for file in files), written])


def _check(
    formats: Sequence[str], chosen: dict[str, Any], has_trace: bool, tp: int, plot: Path | None
) -> None:
    """Raise ConfigError for options that do not go together."""
    if len(set(formats)) < len(formats):
        raise ConfigError(f"--kv-format {', '.join(formats)} names one twice; name each once.")
    for name in ("top_k", "selector", "page_ratio"):
        if chosen[name] is not None and tp > 1:
            raise ConfigError(f"--{name.replace('_', '-')} does not go with --tp; leave it out.")
    if has_trace and chosen["top_k"] is not None:
        raise ConfigError(
            "--top-k does not go with --trace, whose steps choose what was recorded, --copies "
            "times; pass --copies, or leave --top-k out."
        )
    for name, is_given in (("--tp", tp > 1), ("--plot", plot is not None)):
        if len(formats) > 1 and is_given:
            raise ConfigError(f"{name} takes one --kv-format, not {len(formats)}; name one.")


def _modes(
    mode: Sequence[OffloadingMode] | None, hint: Sequence[Hint] | None, tp: int, plot: Path | None
) -> list[dict[str, Any]]:
    """Return the fields of SpardaConfig in which each mode differs from the usual one.

    Raises:
        ConfigError: If modes and hints do not go together, or with something else.
    """
    modes = [str(name) for name in mode or ("forecast",)]
    hints = tuple(map(str, hint or ()))
    for option, names in (("--mode", modes), ("--hint", hints)):
        if len(set(names)) < len(names):
            raise ConfigError(f"{option} {', '.join(names)} names one twice; name each once.")
    if "mixture" in hints:
        raise ConfigError(
            "--hint mixture learns from scores, and those of a trace are made up; measure "
            "--hint ema --hint next_query, of which it is made."
        )
    if hints and "exact" not in modes:
        raise ConfigError("--hint goes with --mode exact alone; add that, or leave it out.")
    if tp > 1 and modes != ["forecast"]:
        raise ConfigError("--tp measures mode forecast alone; leave --mode out.")
    if plot is not None and len(modes) > 1:
        raise ConfigError(f"--plot takes one --mode, not {len(modes)}; name one.")
    named = {"hint": hints} if hints else {}
    exact = {"mode": "exact", **named}
    own: dict[str, dict[str, Any]] = {"forecast": {}, "query": {"mode": "query"}, "exact": exact}
    return [own[name] for name in modes]


def decode_setting(
    batch: int,
    tokens: int,
    overlap: list[float] | None,
    variant: list[Variant] | None,
    rounds: int,
    steps: int,
    fields: Mapping[str, Any] | None = None,
) -> DecodeSetting:
    """Return a checked setting of decode; `fields` are those of SpardaConfig."""
    from sparda_compile.bench.decode import VARIANTS, DecodeSetting

    if tokens % 64 or tokens < _LEAST_TOKENS:
        raise ConfigError(
            f"--tokens {tokens} is no whole number of blocks, or too few to choose from; use a "
            f"multiple of 64 from {_LEAST_TOKENS} on."
        )
    variants = tuple(variant or VARIANTS)
    if "scheduled" not in variants:
        raise ConfigError(
            f"--variant {', '.join(variants)} lacks scheduled, which all others are compared with; "
            "add --variant scheduled."
        )
    overlaps = tuple(overlap or _OVERLAPS)
    return DecodeSetting(batch, tokens, overlaps, variants, rounds, steps, dict(fields or {}))


def _settings(
    each: Sequence[dict[str, Any]],
    chosen: dict[str, Any],
    batches: Sequence[int],
    asked: _Asked,
) -> list[list[DecodeSetting]]:
    """Return checked settings, a list for each file with one for each number of sequences."""
    fields = {name: value for name, value in chosen.items() if value is not None}
    return [
        [decode_setting(batch, *asked, fields={**own, **fields}) for batch in batches]
        for own in each
    ]


def _measure(
    lab: Lab,
    settings: Sequence[DecodeSetting],
    place: tuple[Path, str, int, str | None],
    followed: FollowedTraces | None,
    with_baselines: bool,
) -> ResultFile:
    """Measure settings of one mode and format; returns the file, which is written after each."""
    fields = settings[0].settings
    file = trace_file(*place, fields, followed.plain()) if followed else decode_file(*place, fields)
    for setting in settings:
        lab.decode(setting, file.save, with_baselines=with_baselines)
    return file
