"""`sparda train`: train a model's Forecast from a text or a data set.

On several GPUs: `torchrun --nproc-per-node=8 -m sparda_compile train ...`.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from sparda_compile.cli.console import (
    INTERRUPTED,
    AsJson,
    errors_as_sentences,
    fail,
    make_console,
    print_json,
    print_paths,
)
from sparda_compile.cli.options import (
    MOST_BLOCKS,
    MOST_SEQUENCES,
    MOST_STEPS,
    MOST_TOKENS,
    LocalBlocks,
    Teacher,
)
from sparda_compile.cli.outputs import check_outputs
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

    from sparda_compile.forecast.weights import ForecastWeights
    from sparda_compile.training.report import StepReport

__all__ = ["train_model"]

_LARGEST_RATE: Final = 1e3
_LINE_EVERY_S: Final = 5.0

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
    typer.Option(help="A tokenizer's folder, or 'bytes'.", show_default="the model's folder"),
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
        show_default="at most the size of 256 full rows",
    ),
]


def train_model(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(help="A folder with a model's weights, or a tiny model (tiny-llama).")
    ],
    out: Annotated[
        Path, typer.Option(help="Safetensors file to write; checkpoints are kept beside it.")
    ] = Path("forecast.safetensors"),
    text: Annotated[Path | None, typer.Option(help="A text file to train on.")] = None,
    dataset: DataSet = None,
    tokenizer: Tokenizer = None,
    length: Length = 65536,
    batch: Batch = 1,
    accumulate: Accumulate = 32,
    last_tokens: LastTokens = None,
    teacher: TeacherName = "attention",
    steps: Steps = 2000,
    lr: Rate = 5e-4,
    save_every: SaveEvery = 50,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint to go on from.")] = None,
    top_k: TopK = 62,
    rank: Rank = None,
    block_size: BlockSize = 64,
    local_blocks: LocalBlocks = 32,
    pool_size: PoolSize = 32,
    pool_stride: PoolStride = 16,
    as_json: AsJson = False,
) -> None:
    """Train the Forecast of a model; the model itself is left as it is."""
    lines = _Lines(steps, accumulate)
    with errors_as_sentences(train_model):
        config = SpardaConfig(
            top_k=top_k,
            block_size=block_size,
            local_blocks=local_blocks,
            pool_size=pool_size,
            pool_stride=pool_stride,
            forecast_rank=rank,
        )
        check_outputs(out=out)
        _check_length(length, config)
        batches = _batches(text, dataset, tokenizer or _source(target), length, batch)
        try:
            weights = _train(
                target,
                batches,
                lines,
                config=config,
                steps=steps,
                lr=lr,
                accumulate=accumulate,
                last_tokens=last_tokens,
                teacher=teacher,
                out=out,
                resume=resume,
                save_every=save_every,
                progress=not as_json,
            )
        except KeyboardInterrupt:
            _stop(context, out, lines.reports)
    _show(out, weights, lines.reports, as_json=as_json)


def _source(target: str) -> str:
    """Return the tokenizer that goes with a model."""
    return "bytes" if target.startswith("tiny-") else target


def _train(target: str, batches: Iterable[Tensor], lines: _Lines, **settings: Any) -> Any:
    from sparda_compile.training.run import train_forecast

    lines.say(f"loading {target}")
    model = _model(target)
    lines.say(f"tracing {type(model).__name__}")
    return train_forecast(model, batches, on_step=lines.step, on_batch=lines.batch, **settings)


class _Lines:
    """Says where a training is, on stderr, where there is no terminal for a progress bar."""

    def __init__(self, steps: int, accumulate: int) -> None:
        self.steps = steps
        self.accumulate = accumulate
        self.reports: list[StepReport] = []
        self.console = make_console(stderr=True)
        self.last = time.monotonic()
        self.say("importing torch and transformers")

    def say(self, text: str) -> None:
        """Print a line at once."""
        from sparda_compile.training.parallel import rank_of_environment

        self.last = time.monotonic()
        if not self.console.is_terminal and not rank_of_environment():
            self.console.print(f"{text} ...", markup=False, style="dim", soft_wrap=True)

    def batch(self, done: int, steps_before: int) -> None:
        """Say how far a step is, if nothing was said for a while."""
        if time.monotonic() - self.last >= _LINE_EVERY_S and done < self.accumulate:
            self.say(f"step {steps_before + 1} of {self.steps}, batch {done} of {self.accumulate}")

    def step(self, report: StepReport) -> None:
        """Keep what a step saw; say it of the first, the last, and from time to time."""
        self.reports.append(report)
        is_end = len(self.reports) == 1 or report.step == self.steps
        if not is_end and time.monotonic() - self.last < _LINE_EVERY_S:
            return
        mean = sum(each.seconds for each in self.reports) / len(self.reports)
        left = round(mean * (self.steps - report.step))
        self.say(
            f"step {report.step} of {self.steps}: loss {report.loss:.4f}, recall "
            f"{_share(report.recall)}, {report.seconds:.1f} s a step, about {left} s left"
        )


def _stop(context: typer.Context, out: Path, reports: Sequence[StepReport]) -> NoReturn:
    """Say what an interrupted training has left, and how to go on from it."""
    from sparda_compile.training.checkpoint import checkpoint_path

    given = context.params["resume"]
    if not reports and given is None:
        fail("stopped before the first step was done; there is nothing to go on from.", INTERRUPTED)
    saved = checkpoint_path(out) if reports else given
    words = ["sparda", "train", context.params["target"]]
    for param in context.command.params:
        value = context.params.get(str(param.name))
        if param.name in ("target", "resume", None) or value in (None, False, param.default):
            continue
        words += [param.opts[0]] if value is True else [param.opts[0], str(value)]
    command = shlex.join([*words, "--resume", str(saved)])
    where = f"after step {reports[-1].step}" if reports else "before another step was done"
    fail(f"stopped {where}; {saved} is kept. go on with: {command}", INTERRUPTED)


def _model(target: str) -> nn.Module:
    from sparda_compile.cli.targets import load_target
    from sparda_compile.training.parallel import local_device

    return load_target(target).to(local_device())


def _show(
    out: Path, weights: ForecastWeights, reports: Sequence[StepReport], *, as_json: bool
) -> None:
    """Show what was trained; of several processes, the first one does."""
    from sparda_compile.training.parallel import rank_of_environment

    if rank_of_environment():
        return
    if as_json:
        print_json({"out": str(out), **_found(weights, reports)})
        return
    typer.echo(_summary(reports))
    print_paths([out])


def _batches(
    text: Path | None, dataset: Path | None, tokenizer: str, length: int, batch: int
) -> Iterable[Tensor]:
    if (text is None) == (dataset is None):
        raise ConfigError("what to train on is missing or given twice; pass --text or --dataset.")
    from sparda_compile.training.data import load_dataset, load_tokenizer, text_batches

    sizes = {"length": length, "batch_size": batch}
    if text is not None:
        return text_batches(text, load_tokenizer(tokenizer), **sizes)
    assert dataset is not None
    return load_dataset(dataset, load_tokenizer(tokenizer), **sizes)


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


def _found(weights: ForecastWeights, reports: Sequence[StepReport]) -> dict[str, Any]:
    """Return what was trained and what each step saw, as plain data."""
    assert weights.info is not None
    described = json.loads(weights.info.to_json())
    return {"forecast": described, "steps": [_described(report) for report in reports]}


def _summary(reports: Sequence[StepReport]) -> str:
    first, last = reports[0], reports[-1]
    return (
        f"loss {first.loss:.4f} -> {last.loss:.4f}, recall {_share(first.recall)} -> "
        f"{_share(last.recall)}, {last.num_tokens / last.seconds:.0f} tokens/s"
    )


def _described(report: StepReport) -> dict[str, Any]:
    def known(numbers: dict[int, float]) -> dict[str, float | None]:
        return {str(layer): _number(value) for layer, value in numbers.items()}

    return {
        "step": report.step,
        "loss": report.loss,
        "recall": _number(report.recall),
        "losses": known(report.losses),
        "recalls": known(report.recalls),
        "gradient_norm": report.gradient_norm,
        "num_tokens": report.num_tokens,
        "seconds": report.seconds,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _share(value: float) -> str:
    return "unknown (too short)" if math.isnan(value) else f"{value:.3f}"
