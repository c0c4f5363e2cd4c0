"""`sparda eval formats`: the smallest format of full blocks that each layer stands on a text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sparda_compile.cli.console import (
    AsJson,
    errors_as_sentences,
    make_console,
    print_json,
    print_paths,
    progress,
)
from sparda_compile.cli.devices import check_memory, find_device
from sparda_compile.cli.evaluate_text import BlockSize, DocumentPaths, KvFormats, Model
from sparda_compile.cli.options import MOST_TOKENS, Commit
from sparda_compile.cli.outputs import check_outputs
from sparda_compile.cli.text_request import model_name_and_hash
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from rich.table import Table

    from sparda_compile.evaluation.text.layer_formats import FormatMix

__all__ = ["evaluate_formats"]

_LENGTH: Final = 2048

Limit = Annotated[
    float,
    typer.Option(
        min=1e-12,
        max=1e6,
        help="Divergence from the model that all layers may cost, mean nats.",
    ),
]
Scored = Annotated[
    int, typer.Option(min=1, max=MOST_TOKENS, help="Last tokens of each document, which count.")
]


def evaluate_formats(
    model: Model,
    document: DocumentPaths,
    limit: Limit = 0.01,
    kv_format: KvFormats = None,
    tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Of a document.")] = _LENGTH,
    scored: Scored = 128,
    block_size: BlockSize = SpardaConfig.block_size,
    device: Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Measure what formats of full blocks cost in each layer, and choose the smallest of each.

    What is printed last is what `SpardaConfig(kv_format=...)` takes.
    """
    with errors_as_sentences(evaluate_formats):
        check_outputs(json_file=json_file)
        names = tuple(map(str, kv_format or _usual()))
        if "model" in names:
            raise ConfigError("--kv-format model rounds nothing; name formats that round.")
        with progress() as say:
            say("importing torch and transformers")
            where = find_device(device)
            sizes = (tokens, scored, block_size)
            mix, head = _measure(model, document, (names, limit, sizes), where, say)
        plain = {**head, **_plain(mix)}
        if json_file is not None:
            from sparda_compile.environment import write_result

            write_result(json_file, plain, commit)
        if as_json:
            print_json(plain)
            return
        console = make_console()
        console.print(_table(mix, names))
        console.print(_sentence(mix), markup=False, soft_wrap=True)
        print_paths([json_file])


def _usual() -> list[str]:
    """Return the formats that round and whose keys need no selector."""
    return [found.name for found in KV_FORMATS if found.rounds and found.summary is None]


def _measure(
    target: str,
    paths: Sequence[Path],
    asked: tuple[tuple[str, ...], float, tuple[int, int, int]],
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[FormatMix, dict[str, Any]]:
    """Return the mix, and what decides its numbers."""
    from sparda_compile.cli.targets import load_target, load_tokenizer
    from sparda_compile.evaluation.text.documents import read_documents
    from sparda_compile.evaluation.text.layer_formats import FormatTrial, choose
    from sparda_compile.evaluation.text.run import text_scripts

    names, limit, (length, scored, block_size) = asked
    block_size = SpardaConfig(block_size=block_size, pool_stride=16).block_size
    say("reading documents")
    documents = read_documents(tuple(paths), load_tokenizer(target), length)
    scripts = text_scripts(documents, length, scored)
    say(f"loading {target}")
    model: Any = load_target(target)
    model = (model.float() if device.type == "cpu" else model).to(device)
    check_memory(model.config, len(scripts), length, device)
    say(f"reading {len(scripts)} documents")
    mix = choose(FormatTrial(model, scripts, block_size), names, limit, say)
    settings = {
        "limit": limit,
        "formats": list(names),
        "tokens": length,
        "scored": scored,
        "block_size": block_size,
        "device": str(device),
    }
    head = {
        "name": "eval_formats",
        "model": {**model_name_and_hash(target), "class": type(model).__name__},
        "documents": documents.plain(),
        "settings": settings,
    }
    return mix, head


def _plain(mix: FormatMix) -> dict[str, Any]:
    return {
        "kv_format": {str(layer): name for layer, name in mix.formats.items()},
        "cost": dataclasses.asdict(mix.cost),
        "bytes_share": mix.bytes_share,
        "kl_by_layer": {str(layer): costs for layer, costs in mix.costs.items()},
    }


def _table(mix: FormatMix, names: Sequence[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title="KL of each layer alone, nats", box=SIMPLE_HEAD, padding=(0, 1))
    for column in ("layer", *names):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("chosen")
    for layer, costs in mix.costs.items():
        cells = (f"{costs[name]:.5f}" for name in names)
        table.add_row(str(layer), *cells, mix.formats.get(layer, "model"))
    return table


def _sentence(mix: FormatMix) -> str:
    cost = mix.cost
    return (
        f"Together: {100 * mix.bytes_share:.0f}% of the bytes of a block, KL {cost.kl:.4f} nats, "
        f"perplexity {cost.ratio:.3f} of the model's, same first choice {100 * cost.same:.1f}%.\n"
        f"kv_format={mix.formats}"
    )
