"""`sparda eval trace`: record which blocks a model selects on real text or in talks about it."""

from __future__ import annotations

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
from sparda_compile.cli.devices import find_device
from sparda_compile.cli.evaluate_text import BlockSize, DocumentPaths, Model, Selectors, Shares
from sparda_compile.cli.options import MOST_TOKENS, LocalBlocks
from sparda_compile.cli.outputs import check_outputs
from sparda_compile.cli.text_request import model_name_and_hash
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sparda_compile.traces import Recording, TraceFile

__all__ = ["record_trace"]

_SELECTORS: Final = ("infllm2",)
_BUDGETS: Final = (0.1, 0.25)

Questions = Annotated[
    list[str] | None,
    typer.Option(
        "--question",
        help="Ask the model about each document, and record its answers in the place of the text; "
        "may be given again.",
        show_default="the text is recorded",
    ),
]


def record_trace(
    model: Model,
    document: DocumentPaths,
    selector: Selectors = None,
    budget: Shares = None,
    tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens before the first step.")
    ] = 6144,
    steps: Annotated[
        int,
        typer.Option(min=2, max=MOST_TOKENS, help="Decode steps; of each answer, at most."),
    ] = 64,
    question: Questions = None,
    block_size: BlockSize = SpardaConfig.block_size,
    local_blocks: LocalBlocks = 2,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("trace.safetensors"),
    device: Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Record the blocks that queries select on documents; see `sparda bench decode --trace`."""
    with errors_as_sentences(record_trace):
        check_outputs(out=out)
        with progress() as say:
            say("importing torch and transformers")
            find_device(device)
            configs = {
                share: [
                    _config(rule, share, tokens + steps, block_size, local_blocks)
                    for rule in selector or _SELECTORS
                ]
                for share in budget or _BUDGETS
            }
            lengths = (tokens, steps)
            traces = _record(model, document, configs, lengths, question or (), device, say)
            traces.save(out)
    found = _described(traces)
    if as_json:
        print_json({"out": str(out), "recordings": found})
        return
    from sparda_compile.bench.show import make_table

    table = make_table(
        "", ("text", "steps", "selector", "blocks", "chosen", "overlap", "by layer"), 3
    )
    for row in found:
        layers = row["overlap_by_layer"]
        table.add_row(
            row["text"],
            " + ".join(map(str, row["answers"] or [row["steps"]])),
            row["selector"],
            f"{row['share']:.0%}",
            f"{row['chosen']} of {row['num_free']}",
            f"{row['overlap']:.3f}",
            f"{min(layers):.2f} to {max(layers):.2f}",
        )
    make_console().print(table)
    print_paths([out])


def _config(
    selector: str, share: float, length: int, block_size: int, local_blocks: int
) -> SpardaConfig:
    from sparda_compile.evaluation.run import budget_config

    sizes: dict[str, Any] = {"block_size": block_size, "local_blocks": local_blocks}
    base = SpardaConfig(mode="query", selector=selector, top_k=None, **sizes)
    return budget_config(base, length, share)


def _record(
    target: str,
    paths: Sequence[Path],
    configs: dict[float, list[SpardaConfig]],
    lengths: tuple[int, int],
    questions: Sequence[str],
    device: str,
    say: Callable[[str], None],
) -> TraceFile:
    from sparda_compile.cli.targets import load_target, load_tokenizer
    from sparda_compile.evaluation.text.documents import read_documents
    from sparda_compile.evaluation.text.recording import (
        check_choices,
        record_document,
        record_talk,
    )
    from sparda_compile.evaluation.text.talk import hold_talk
    from sparda_compile.traces import TraceFile

    say("reading documents")
    tokenizer = load_tokenizer(target)
    documents = read_documents(paths, tokenizer, 1 if questions else sum(lengths))
    check_choices(configs, lengths[0])
    say(f"loading {target}")
    model: Any = load_target(target)
    model = (model.float() if device == "cpu" else model).to(device)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and sum(lengths) > positions:
        raise ConfigError(
            f"tokens={lengths[0]} and steps={lengths[1]} are more than the {positions} positions "
            "that the model was made for; use fewer."
        )
    recordings: list[Recording] = []
    for each in documents.each:
        if questions:
            talk = hold_talk(model, tokenizer, each, documents.begin, questions, lengths, say)
            recordings += record_talk(model, each, talk, configs, say)
        else:
            recordings += record_document(model, each, documents.begin, configs, *lengths, say)
    about = {**model_name_and_hash(target), "dtype": str(model.dtype).removeprefix("torch.")}
    first = next(iter(configs.values()))[0]
    return TraceFile(about, first.block_size, tuple(recordings))


def _described(traces: TraceFile) -> list[dict[str, Any]]:
    """Return what was recorded, as plain data."""
    rows = []
    for each in traces.recordings:
        layers = each.overlap_by_layer()
        rows.append(
            {
                "text": each.text,
                "sha256": each.sha256,
                "selector": each.selector,
                "share": each.share,
                "chosen": each.ids_LSGK.shape[-1],
                "num_free": each.num_free,
                "steps": each.ids_LSGK.shape[1],
                "answers": [*each.answers],
                "overlap": round(sum(layers) / len(layers), 4),
                "overlap_by_layer": [round(layer, 3) for layer in layers],
            }
        )
    return rows
