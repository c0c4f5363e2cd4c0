"""`sparda inspect`: what `optimize` would do to a model, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from sparda_compile.cli.console import (
    CANNOT,
    AsJson,
    default_page,
    errors_as_sentences,
    fail,
    make_console,
    print_json,
    print_paths,
    progress,
)
from sparda_compile.cli.options import (
    MOST_BLOCKS,
    MOST_SEQUENCES,
    MOST_TOKENS,
    Hint,
    LocalBlocks,
    Machine,
    Mode,
    Offload,
    Repair,
    Selector,
    ShortList,
    Where,
)
from sparda_compile.cli.outputs import check_outputs, write_file
from sparda_compile.config import SpardaConfig, round_up
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from sparda_compile.report.model import Report

__all__ = ["inspect_model"]

_ALL: Final = "all"
_HINT: Final = "forecast"
_PAGE: Final = "sparda-report.html"

Target = Annotated[
    str,
    typer.Argument(
        help="A model type of transformers (llama: its default configuration), a folder with "
        "a config.json, or a tiny model (tiny-llama). Weights are never read."
    ),
]
Hints = Annotated[
    list[Hint] | None,
    typer.Option(help="What mode exact prefetches by, may be given again.", show_default=_HINT),
]
TopK = Annotated[str, typer.Option(help="Blocks to pick beyond sink and local ones, or 'all'.")]


def inspect_model(
    target: Target,
    mode: Annotated[Mode, typer.Option(help="Who selects the blocks.")] = "forecast",
    selector: Annotated[Selector, typer.Option(help="How a query scores blocks.")] = "infllm2",
    hint: Hints = None,
    top_k: TopK = "62",
    short_list: ShortList = SpardaConfig.short_list,
    local_blocks: LocalBlocks = SpardaConfig.local_blocks,
    batch: Annotated[
        int, typer.Option(min=1, max=MOST_SEQUENCES, help="Sequences to plan for.")
    ] = 1,
    tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens per sequence to plan for.")
    ] = 32768,
    machine: Annotated[Machine, typer.Option(help="Whose constants predict times.")] = "h200",
    offload: Annotated[Offload, typer.Option(help="Whether KV is in CPU memory.")] = "always",
    repair: Annotated[
        Repair, typer.Option(help="Whether mode speculate keeps what was predicted in vain.")
    ] = "exact",
    speculate_where: Annotated[
        Where, typer.Option(help="In which layers it speculates: where it gains, or in all.")
    ] = "auto",
    html: Annotated[
        Path | None, typer.Option(help="HTML report to write.", show_default=_PAGE)
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Chrome trace of the decode schedule to write.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what `optimize` would do to a model, without running it."""
    with errors_as_sentences(inspect_model):
        config = SpardaConfig(
            mode=mode,
            selector=selector,
            hint=tuple(hint or (_HINT,)),
            top_k=_parse_top_k(top_k),
            short_list=short_list,
            local_blocks=local_blocks,
            machine=machine,
            offload=offload,
            repair=repair,
            speculate_where=speculate_where,
        )
        html = html or default_page(_PAGE, as_json)
        check_outputs(html=html, trace=trace)
        _check_trace(config, trace)
        report = _explain(target, config, batch, tokens)
        if as_json:
            print_json(report.to_dict())
        if report.error:
            fail(report.error, CANNOT)
        written = _write_report(report, config, html, trace)
    if not as_json:
        from sparda_compile.cli.tables import print_report

        print_report(report, make_console())
        print_paths(written)


def _explain(target: str, config: SpardaConfig, batch: int, tokens: int) -> Report:
    with progress() as say:
        say("importing torch and transformers")
        from sparda_compile.api import explain
        from sparda_compile.cli.targets import build_target

        say(f"building {target}")
        model = build_target(target)
        say(f"tracing and rewriting {type(model).__name__}")
        max_tokens = round_up(tokens, config.block_size)
        return explain(model, config, batch_size=batch, max_tokens=max_tokens)


def _parse_top_k(text: str) -> int | None:
    if text == _ALL:
        return None
    try:
        count = int(text)
    except ValueError:
        raise ConfigError(
            f"--top-k {text} is no number; pass one, or 'all' for every block."
        ) from None
    if not 0 <= count <= MOST_BLOCKS:
        raise ConfigError(
            f"--top-k {text} is no number of blocks; use 0 to {MOST_BLOCKS}, or 'all' for every "
            "block."
        )
    return count


def _check_trace(config: SpardaConfig, trace: Path | None) -> None:
    stays = config.offload == "never" and config.mode != "speculate"
    if trace is not None and (config.mode == "dense" or stays):
        raise _no_schedule(config, trace)


def _no_schedule(config: SpardaConfig, trace: Path) -> ConfigError:
    return ConfigError(
        f"--trace {trace}: mode={config.mode!r} with offload={config.offload!r} has no decode "
        "schedule to trace; use --mode forecast, query or exact with --offload always, or "
        "speculate with --offload never."
    )


def _write_report(
    report: Report, config: SpardaConfig, html: Path | None, trace: Path | None
) -> list[Path | None]:
    """Write what was asked for of a report: a page, and the trace of the decode schedule."""
    decode = next((s for s in report.schedules if s.phase == "decode"), None)
    if trace is not None and decode is None:
        raise _no_schedule(config, trace)
    written = [write_file(report.to_html, html)]
    return [*written, write_file(decode.to_chrome_trace, trace) if decode else None]
