"""`sparda train`: train a model's Forecast from documents, a text or a data set.

On several GPUs: `torchrun --nproc-per-node=8 -m sparda_compile train ...`; with `--tp 2` each two
share the model, and there are four replicas.
"""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from sparda_compile.cli.again import words_of
from sparda_compile.cli.console import (
    INTERRUPTED,
    AsJson,
    errors_as_sentences,
    fail,
)
from sparda_compile.cli.options import (
    LARGEST_SEED,
    MOST_BLOCKS,
    MOST_SEQUENCES,
    MOST_STEPS,
    MOST_TOKENS,
    LocalBlocks,
    Selector,
    Teacher,
)
from sparda_compile.cli.outputs import check_outputs
from sparda_compile.cli.ranks import NumRanks
from sparda_compile.cli.real_model import REAL_MODEL
from sparda_compile.cli.train_data import DocumentBatches, Sources
from sparda_compile.cli.train_lines import TrainingLines
from sparda_compile.cli.train_show import show_training
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

    from sparda_compile.forecast.weights import ForecastWeights
    from sparda_compile.training.report import StepReport

__all__ = ["train_model"]

_LARGEST_RATE: Final = 1e3
_MOST_HEADS: Final = 1 << 10

Length = Annotated[int, typer.Option(min=2, max=MOST_TOKENS, help="Tokens of one sequence.")]
Batch = Annotated[int, typer.Option(min=1, max=MOST_SEQUENCES, help="Sequences of one batch.")]
Accumulate = Annotated[
    int, typer.Option(min=1, max=MOST_SEQUENCES, help="Batches per step and process.")
]
Steps = Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Optimizer steps in all.")]
Rate = Annotated[float, typer.Option(min=0.0, max=_LARGEST_RATE, help="Learning rate.")]
SaveEvery = Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Steps between checkpoints.")]
TopK = Annotated[
    int, typer.Option(min=1, max=MOST_BLOCKS, help="Blocks that the Forecast is to pick.")
]
BlockSize = Annotated[int, typer.Option(min=16, max=128, help="Tokens of one block.")]
PoolSize = Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of one pooled key.")]
PoolStride = Annotated[
    int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens between pooled keys.")
]
DataSet = Annotated[
    Path | None, typer.Option(help="A data set to train on, as save_to_disk wrote it.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help=f"A tokenizer's folder, {REAL_MODEL}, or 'bytes'.", show_default="the model's"
    ),
]
DocumentPaths = Annotated[
    list[Path] | None,
    typer.Option(
        "--document", help="Text file, or folder of text files, to train on. May be given again."
    ),
]
AllTokens = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        min=1,
        max=MOST_STEPS,
        help="Tokens of documents to learn from, in the place of --steps.",
        show_default="by --steps",
    ),
]
HeldOut = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Share of the documents to measure, not to learn.")
]
HeldOutBatches = Annotated[
    int, typer.Option(min=1, max=MOST_SEQUENCES, help="Most batches of them to measure.")
]
MeasureEvery = Annotated[
    int, typer.Option(min=1, max=MOST_STEPS, help="Steps between two measurements of them.")
]
SelectorName = Annotated[
    Selector, typer.Option(help="Selector whose summary of the keys the Forecast is to score.")
]
Seed = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help="Of documents' order, and of those held out.")
]
LastTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_TOKENS,
        help="Tokens at a sequence's end to learn from.",
        show_default="all",
    ),
]
TeacherName = Annotated[
    Teacher,
    typer.Option(help="attention: where the attention goes. query: what the query chooses."),
]
Rank = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_TOKENS,
        help="Rank of a projection.",
        show_default="at most the size of 256 full rows for each of --forecast-heads",
    ),
]


Heads = Annotated[
    int | None,
    typer.Option(
        "--forecast-heads",
        min=1,
        max=_MOST_HEADS,
        help="Heads of a Forecast for each KV head; with lowbit2 and lowbit4.",
        show_default="1",
    ),
]


def train_model(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            help=f"A folder with a model's weights, {REAL_MODEL}, or a tiny model (tiny-llama)."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Safetensors file to write; checkpoints are kept beside it.")
    ] = Path("forecast.safetensors"),
    document: DocumentPaths = None,
    text: Annotated[Path | None, typer.Option(help="A text file to train on.")] = None,
    dataset: DataSet = None,
    tokenizer: Tokenizer = None,
    length: Length = 65536,
    batch: Batch = 1,
    accumulate: Accumulate = 32,
    last_tokens: LastTokens = None,
    teacher: TeacherName = "attention",
    selector: SelectorName = "infllm2",
    steps: Steps = 2000,
    tokens: AllTokens = None,
    held_out: HeldOut = 0.02,
    held_out_batches: HeldOutBatches = 4,
    measure_every: MeasureEvery = 100,
    seed: Seed = 0,
    lr: Rate = 5e-4,
    save_every: SaveEvery = 50,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint to go on from.")] = None,
    top_k: TopK = 62,
    rank: Rank = None,
    forecast_heads: Heads = None,
    block_size: BlockSize = 64,
    local_blocks: LocalBlocks = 32,
    pool_size: PoolSize = 32,
    pool_stride: PoolStride = 16,
    tp: NumRanks = 1,
    as_json: AsJson = False,
) -> None:
    """Train the Forecast of a model; the model itself is left as it is."""
    lines = TrainingLines(accumulate)
    sizes: dict[str, Any] = {"block_size": block_size, "local_blocks": local_blocks}
    sizes |= {"pool_size": pool_size, "pool_stride": pool_stride, "forecast_rank": rank}
    sizes |= {"forecast_heads": forecast_heads}
    often = {"save_every": save_every, "measure_every": measure_every, "progress": not as_json}
    learned: dict[str, Any] = {"lr": lr, "accumulate": accumulate, "last_tokens": last_tokens}
    with errors_as_sentences(train_model):
        config = SpardaConfig(selector=selector, top_k=top_k, **sizes)
        check_outputs(out=out)
        _check_length(length, config)
        cut = (length, batch, held_out, held_out_batches, seed)
        found = Sources(tuple(document or ()), text, dataset, tokenizer or _source(target), *cut)
        data = found.read(lines.say)
        lines.steps = _steps(data, steps, tokens, accumulate * _replicas(tp), lines)
        learned |= {"teacher": teacher, "steps": lines.steps, "config": config}
        try:
            weights = _train(target, data, lines, tp, out=out, resume=resume, **learned, **often)
        except KeyboardInterrupt:
            _stop(context, out, lines.reports)
    show_training(out, weights, lines, data, tp, as_json=as_json)


def _source(target: str) -> str:
    """Return the tokenizer that goes with a model."""
    return "bytes" if target.startswith("tiny-") else target


def _replicas(tp: int) -> int:
    """Return how many replicas of the model train, of `tp` processes each."""
    from sparda_compile.training.parallel import world_of_environment

    world = world_of_environment()
    if world % tp:
        raise ConfigError(
            f"--tp {tp} shares the model among as many processes, and {world} are running; start a "
            "multiple of them: torchrun --nproc-per-node=N -m sparda_compile train."
        )
    return world // tp


def _steps(
    data: DocumentBatches | Iterable[Tensor],
    steps: int,
    tokens: int | None,
    per_step: int,
    lines: TrainingLines,
) -> int:
    """Return how many steps to take; of documents, say how often that goes through them."""
    if not isinstance(data, DocumentBatches):
        if tokens is not None:
            raise ConfigError("--tokens counts those of documents; pass --document, or --steps.")
        return steps
    if tokens is not None:
        steps = data.steps(tokens, per_step)
    lines.say(data.sentence(steps, per_step))
    return steps


def _train(
    target: str,
    data: DocumentBatches | Iterable[Tensor],
    lines: TrainingLines,
    tp: int,
    **settings: Any,
) -> ForecastWeights:
    from sparda_compile.training.parallel import local_device, process_group
    from sparda_compile.training.run import train_forecast

    # A sharded model is loaded by all of its processes together.
    with process_group(local_device()) if tp > 1 else contextlib.nullcontext():
        lines.say(f"loading {target}")
        model = _model(target, tp)
        lines.say(f"tracing {type(model).__name__}")
        said: dict[str, Any] = {"on_step": lines.step, "on_batch": lines.batch}
        if not isinstance(data, DocumentBatches):
            return train_forecast(model, data, **said, **settings)
        held_out = data.held_out or None
        said["on_measure"] = lines.measured
        return train_forecast(model, data.batches, held_out=held_out, **said, **settings)


def _stop(context: typer.Context, out: Path, reports: Sequence[StepReport]) -> NoReturn:
    """Say what an interrupted training has left, and how to go on from it."""
    from sparda_compile.training.checkpoint import checkpoint_path
    from sparda_compile.training.parallel import rank_of_environment

    if rank_of_environment():
        raise typer.Exit(INTERRUPTED)
    given = context.params["resume"]
    if not reports and given is None:
        fail("stopped before the first step was done; there is nothing to go on from.", INTERRUPTED)
    saved = checkpoint_path(out) if reports else given
    words = words_of(context, without=("resume",))
    command = shlex.join(["sparda", "train", *words, "--resume", str(saved)])
    where = f"after step {reports[-1].step}" if reports else "before another step was done"
    fail(f"stopped {where}; {saved} is kept. go on with: {command}", INTERRUPTED)


def _model(target: str, tp: int) -> nn.Module:
    from sparda_compile.cli.targets import load_shared, load_target
    from sparda_compile.training.parallel import local_device

    device = local_device()
    if tp > 1:
        from sparda_compile.training.replica_plan import replica_plan

        return load_shared(target, replica_plan(tp), device)
    model = load_target(target)
    # Half precision is slow on a CPU.
    return model.float() if device.type == "cpu" else model.to(device)


def _check_length(length: int, config: SpardaConfig) -> None:
    """Find out now, not after the model was traced."""
    from sparda_compile.training.data import shortest_sequence

    least = shortest_sequence(config)
    if length < least:
        raise ConfigError(
            f"--length {length} is too short: sink, local and current blocks cover the first "
            f"{least - 1} tokens, so a Forecast has nothing to choose; use {least} or more, or "
            "lower --local-blocks or --block-size."
        )
