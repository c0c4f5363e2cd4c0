"""`sparda demo`: a small model in every mode, on the CPU."""

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
from sparda_compile.cli.devices import check_memory, find_device
from sparda_compile.cli.options import LARGEST_SEED, MOST_TOKENS, Mode, choices
from sparda_compile.cli.outputs import check_outputs, write_file

if TYPE_CHECKING:
    from sparda_compile.demo.needles import NeedleDemo
    from sparda_compile.demo.run import Demo

    ModelName = str
else:
    ModelName = choices("ModelName", ("small", "random"))

__all__ = ["demo"]

_PAGE: Final = "sparda-demo.html"
_RANDOM_TOKENS: Final = 8192
_MOST_NEW: Final = 1 << 16

Modes = Annotated[
    list[Mode] | None,
    typer.Option(help="Mode to run, may be given again.", show_default="all of them"),
]
Model = Annotated[
    ModelName,
    typer.Option(
        help="small: the shipped model finds needles in a haystack; random: a tiny random Llama is "
        "compared with the original."
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        min=64,
        max=MOST_TOKENS,
        help="Tokens to read.",
        show_default=f"16448; random: {_RANDOM_TOKENS}",
    ),
]
NewTokens = Annotated[
    int, typer.Option(min=2, max=_MOST_NEW, help="Tokens that the random model generates.")
]
Seed = Annotated[
    int,
    typer.Option(min=0, max=LARGEST_SEED, help="Seed of the haystack, or of the random weights."),
]


def demo(
    mode: Modes = None,
    model: Model = "small",
    tokens: Tokens = None,
    new_tokens: NewTokens = 24,
    seed: Seed = 0,
    html: Annotated[
        Path | None, typer.Option(help="HTML report to write.", show_default=_PAGE)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a small model in every mode on the CPU: what is right, what is equal, what moves."""
    with errors_as_sentences(demo):
        page = html or default_page(_PAGE, as_json)
        check_outputs(html=page)
        result: Demo | NeedleDemo
        with progress() as say:
            say("importing torch and transformers")
            if model == "small":
                from sparda_compile.demo.needles import run_shipped_model
                from sparda_compile.demo.small_model import small_model_config

                check_memory(small_model_config(), 1, tokens or 1, find_device("cpu"))
                result = run_shipped_model(modes=mode, num_tokens=tokens, seed=seed, progress=say)
            else:
                from sparda_compile.demo.run import MODES, run_demo

                result = run_demo(
                    modes=mode or MODES,
                    num_tokens=tokens or _RANDOM_TOKENS,
                    new_tokens=new_tokens,
                    seed=seed,
                    progress=say,
                )
        from sparda_compile.demo.table import write_demo

        written = write_file(lambda path: write_demo(result, path), page)
    if as_json:
        print_json(result.to_dict())
    else:
        from sparda_compile.cli.tables import print_demo

        print_demo(result, make_console())
        print_paths([written])
    if result.mismatches:
        fail("; ".join(result.mismatches) + ".", CANNOT)
