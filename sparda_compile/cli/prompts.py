"""`sparda bench prefill` and `sparda bench turns`: the time to the first token of `generate`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sparda_compile.cli import labs
from sparda_compile.cli.bench_files import REPEAT, prompt_file
from sparda_compile.cli.console import (
    AsJson,
    errors_as_sentences,
    make_console,
    print_json,
    print_paths,
    progress,
)
from sparda_compile.cli.options import (
    MOST_MINUTES,
    MOST_TOKENS,
    Commit,
    HostGib,
    OutFolder,
    PrefillCandidates,
    PrefillSelector,
    PromptProgram,
    Selector,
    ShapeOption,
)
from sparda_compile.cli.outputs import check_folder, check_plot, write_file
from sparda_compile.cli.ranks import NumRanks, prompts_on_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparda_compile.bench.lab import Lab
    from sparda_compile.bench.result_file import ResultFile
    from sparda_compile.bench.suite import Part

__all__ = ["bench_prefill", "bench_turns", "prompt_part"]

_MOST_ROUNDS: Final = 1000
_ROUNDS: Final = 5

PromptTokens = Annotated[
    list[int] | None,
    typer.Option(
        min=2,
        max=MOST_TOKENS,
        help="Tokens of the prompt, may be given again; they are measured in this order.",
        show_default="1K, 128K, 32K, 512K, 1M, 4K",
    ),
]
PastTokens = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        max=MOST_TOKENS,
        help="Tokens that the cache holds before, may be given again.",
        show_default="131072",
    ),
]
TurnTokens = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        max=MOST_TOKENS,
        help="Tokens of a turn, may be given again.",
        show_default="1, 200, 4000",
    ),
]
Programs = Annotated[
    list[PromptProgram] | None,
    typer.Option(help="One of ours, may be given again.", show_default="all that offload"),
]
HowSelected = Annotated[
    Selector | None,
    typer.Option("--selector", help="Who scores blocks, of all of ours.", show_default="as usual"),
]
Baseline = Annotated[
    bool, typer.Option("--baseline/--no-baseline", help="Measure transformers' cache too.")
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_TOKENS,
        help="Columns of a prompt that ours read at once.",
        show_default="as the library has it",
    ),
]
Repeat = Annotated[
    int,
    typer.Option(
        min=1,
        max=MOST_TOKENS,
        help="How often each random token stands in a row: neighbours then select alike.",
    ),
]
Profile = Annotated[
    bool,
    typer.Option(
        "--profile/--no-profile",
        help="Behind all that is timed, profile a call of each of ours: are its copies hidden?",
    ),
]
Limit = Annotated[
    float, typer.Option(min=0, max=60 * MOST_MINUTES, help="Most seconds of one call.")
]
Minutes = Annotated[float, typer.Option(min=0, max=MOST_MINUTES, help="Time for everything.")]
Rounds = Annotated[
    int, typer.Option(min=1, max=_MOST_ROUNDS, help="Most warm calls; fewer of long ones.")
]


def bench_prefill(
    context: typer.Context,
    shape: ShapeOption = "8b",
    tokens: PromptTokens = None,
    program: Programs = None,
    selector: HowSelected = None,
    prefill_selector: PrefillSelector = None,
    prefill_candidates: PrefillCandidates = None,
    baseline: Baseline = True,
    rounds: Rounds = _ROUNDS,
    limit: Limit = 130.0,
    minutes: Minutes = 60.0,
    chunk_tokens: ChunkTokens = None,
    repeat: Repeat = REPEAT,
    profile: Profile = True,
    out: OutFolder = Path("bench-results"),
    plot: Annotated[Path | None, typer.Option(help="Plot to write, such as prefill.png.")] = None,
    max_host_gib: HostGib = None,
    tp: NumRanks = 1,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Measure the time to the first token of prompts, and of the tokens behind it."""
    with errors_as_sentences(bench_prefill):
        with progress() as say:
            say("importing torch and transformers")
            from sparda_compile.bench.prefill import DEFAULT_TOKENS, PrefillSetting
            from sparda_compile.bench.prompt_programs import OURS_OFFLOADED, PREFILL_BACKENDS

            fields = _settings(chunk_tokens, selector, prefill_selector, prefill_candidates)
            times = (rounds, limit, minutes)
            setting = PrefillSetting(
                tuple(dict.fromkeys(tokens or DEFAULT_TOKENS)),
                (*(program or OURS_OFFLOADED), *(PREFILL_BACKENDS if baseline else ())),
                *times,
                fields,
                repeat,
                profile,
            )
            check_plot(plot)
            check_folder(out)
            named = partial(prompt_file, "prefill", out, shape, commit, fields, repeat, tp)
            if tp == 1:
                labs.require_gpu("sparda bench prefill")
                file = named()
                labs.make_lab(shape, say, max_host_gib).prefill(setting, file)
        if tp > 1:
            found = prompts_on_ranks(context, shape, setting, tp, named, max_host_gib)
            if found is None:  # one of the ranks: it has written what it found
                return
            file = found
        from sparda_compile.bench.plots import write_prefill_plot
        from sparda_compile.bench.show import print_prefill

        written = write_file(lambda path: write_prefill_plot(file.content(), path), plot)
    if as_json:
        print_json(file.content())
        return
    print_prefill(file.content(), make_console())
    print_paths([file.path, written])


def bench_turns(
    context: typer.Context,
    shape: ShapeOption = "8b",
    past: PastTokens = None,
    tokens: TurnTokens = None,
    program: Programs = None,
    selector: HowSelected = None,
    prefill_selector: PrefillSelector = None,
    prefill_candidates: PrefillCandidates = None,
    baseline: Baseline = True,
    rounds: Rounds = _ROUNDS,
    chunk_tokens: ChunkTokens = None,
    repeat: Repeat = REPEAT,
    profile: Profile = True,
    out: OutFolder = Path("bench-results"),
    max_host_gib: HostGib = None,
    tp: NumRanks = 1,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Measure the next turns of a conversation that is in the cache already."""
    with errors_as_sentences(bench_turns):
        with progress() as say:
            say("importing torch and transformers")
            from sparda_compile.bench.prompt_programs import BACKENDS, OURS_OFFLOADED
            from sparda_compile.bench.turns import DEFAULT_TURNS, TurnSetting

            fields = _settings(chunk_tokens, selector, prefill_selector, prefill_candidates)
            setting = TurnSetting(
                tuple(dict.fromkeys(past or TurnSetting.past)),
                tuple(dict.fromkeys(tokens or DEFAULT_TURNS)),
                (*(program or OURS_OFFLOADED), *(BACKENDS if baseline else ())),
                rounds,
                fields,
                repeat,
                profile,
            )
            check_folder(out)
            named = partial(prompt_file, "turns", out, shape, commit, fields, repeat, tp)
            if tp == 1:
                labs.require_gpu("sparda bench turns")
                file = named()
                labs.make_lab(shape, say, max_host_gib).turns(setting, file)
        if tp > 1:
            found = prompts_on_ranks(context, shape, setting, tp, named, max_host_gib)
            if found is None:  # one of the ranks: it has written what it found
                return
            file = found
        from sparda_compile.bench.show import print_turns
    if as_json:
        print_json(file.content())
        return
    print_turns(file.content(), make_console())
    print_paths([file.path])


def prompt_part(
    what: str,
    shape: str,
    size: int,
    minutes: float,
    place: tuple[Path, str | None],
    lab: Callable[[str], Lab],
) -> Part:
    """Return a part of `sparda bench all`; without profiles, which slow the parts behind it.

    Args:
        what: `prefill` or `turns`.
        shape: A key of `SHAPES`.
        size: Tokens of the prompt, or of the past.
        minutes: What it takes.
        place: Folder of the results, and the commit to note.
        lab: Returns the lab of a shape.
    """
    from sparda_compile.bench.prefill import PrefillSetting
    from sparda_compile.bench.suite import Part
    from sparda_compile.bench.turns import TurnSetting

    out, commit = place
    file = partial(prompt_file, what, out, shape, commit)
    if what == "prefill":
        prompt = PrefillSetting((size,), minutes=2 * minutes, profile=False)
        return Part(
            f"prefill {shape} {size} tokens",
            minutes,
            lambda: _is_whole(file(), size, prompt.programs),
            lambda: lab(shape).prefill(prompt, file()),
        )
    turns = TurnSetting((size,), profile=False)
    return Part(
        f"turns {shape} behind {size} tokens",
        minutes,
        lambda: _is_whole(file(), size, turns.programs, turns.turns),
        lambda: lab(shape).turns(turns, file()),
    )


def _is_whole(
    file: ResultFile, size: int, programs: tuple[str, ...], turns: tuple[int, ...] = ()
) -> bool:
    """Return whether there is everything of a length, or a reason in its place."""
    found = file.get(size)
    if found is None or not file.has(size):
        return False
    rows = {name: found["programs"].get(name, {}) for name in programs}
    return all(
        name in found["skipped"] or (row and all(str(t) in row["by_turn"] for t in turns))
        for name, row in rows.items()
    )


def _settings(
    chunk_tokens: int | None,
    selector: str | None,
    prefill_selector: str | None,
    prefill_candidates: float | None,
) -> dict[str, Any]:
    """Return the fields of SpardaConfig that are given, for all of ours."""
    given = {
        "chunk_tokens": chunk_tokens,
        "selector": selector,
        "prefill_selector": prefill_selector,
        "prefill_candidates": prefill_candidates,
    }
    return {name: value for name, value in given.items() if value is not None}
