"""`sparda bench compile`: compile the programs of decode before a benchmark needs them."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from sparda_compile.cli import labs
from sparda_compile.cli.console import CANNOT, errors_as_sentences, fail, progress
from sparda_compile.cli.options import MOST_SEQUENCES, MOST_TOKENS, Shape, Variant

__all__ = ["bench_compile"]

_SHAPES: Final[tuple[Shape, ...]] = ("8b",)
_MOST_JOBS: Final = 1024
_TOKENS: Final = 131072

Batches = Annotated[
    list[int] | None,
    typer.Option(
        min=1, max=MOST_SEQUENCES, help="Sequences, may be given again.", show_default="1"
    ),
]
Variants = Annotated[
    list[Variant] | None,
    typer.Option(help="Program, may be given again.", show_default="all of them"),
]
Tokens = Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens per sequence.")]


def bench_compile(
    shape: Annotated[
        list[Shape] | None,
        typer.Option(help="Model, may be given again.", show_default=_SHAPES[0]),
    ] = None,
    batch: Batches = None,
    variant: Variants = None,
    tokens: Tokens = _TOKENS,
    jobs: Annotated[int, typer.Option(min=1, max=_MOST_JOBS, help="Processes at a time.")] = 4,
) -> None:
    """Compile the programs of decode ahead, several at a time; a benchmark then finds them."""
    with errors_as_sentences(bench_compile), progress() as say:
        say("importing torch and transformers")
        from itertools import product

        from sparda_compile.bench.decode import VARIANTS
        from sparda_compile.bench.precompile import Target, compile_apart, compile_here

        sizes = product(shape or _SHAPES, batch or (1,), variant or VARIANTS)
        targets = [Target(*each, tokens) for each in sizes]
        labs.require_gpu("sparda bench compile")
        failed = []
        if jobs == 1 or len(targets) == 1:
            compile_here(targets, "cuda", say)
        else:
            failed = [found for found in compile_apart(targets, jobs, say) if found[2]]
    if failed:
        target, _, output = failed[0]
        names = ", ".join(str(each[0]) for each in failed)
        fail(f"{names} failed; {target} ended with:\n{output}", CANNOT)
