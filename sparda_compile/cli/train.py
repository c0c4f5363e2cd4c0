"""`sparda train`: train a model's Forecast from a text or a data set.

On several GPUs: `torchrun --nproc-per-node=8 -m sparda_compile train ...`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparda_compile.cli.console import AsJson, errors_as_sentences, print_json, print_paths
from sparda_compile.cli.options import MOST_TOKENS, Teacher
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

    from sparda_compile.forecast.weights import ForecastWeights
    from sparda_compile.training.report import StepReport

__all__ = ["train_model"]

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
    target: Annotated[
        str, typer.Argument(help="A folder with a model's weights, or a tiny model (tiny-llama).")
    ],
    out: Annotated[
        Path, typer.Option(help="Safetensors file to write; checkpoints are kept beside it.")
    ] = Path("forecast.safetensors"),
    text: Annotated[Path | None, typer.Option(help="A text file to train on.")] = None,
    dataset: DataSet = None,
    tokenizer: Tokenizer = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of one sequence.")] = 65536,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of one batch.")] = 1,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per step and process.")] = 32,
    last_tokens: LastTokens = None,
    teacher: TeacherName = "attention",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps in all.")] = 2000,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-4,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint to go on from.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Blocks that the Forecast is to pick.")] = 62,
    rank: Rank = None,
    block_size: Annotated[int, typer.Option(help="Tokens of one block.")] = 64,
    local_blocks: Annotated[int, typer.Option(help="Recent blocks that are always read.")] = 32,
    pool_size: Annotated[int, typer.Option(help="Tokens of one pooled key.")] = 32,
    pool_stride: Annotated[int, typer.Option(help="Tokens between pooled keys.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Train the Forecast of a model; the model itself is left as it is."""
    reports: list[StepReport] = []
    with errors_as_sentences():
        config = SpardaConfig(
            top_k=top_k,
            block_size=block_size,
            local_blocks=local_blocks,
            pool_size=pool_size,
            pool_stride=pool_stride,
            forecast_rank=rank,
        )
        _check_writable(out)
        source = tokenizer or ("bytes" if target.startswith("tiny-") else target)
        batches = _batches(text, dataset, source, length, batch)
        from sparda_compile.training.trainer import train_forecast

        weights = train_forecast(
            _model(target),
            batches,
            config=config,
            steps=steps,
            lr=lr,
            accumulate=accumulate,
            last_tokens=last_tokens,
            teacher=teacher,
            out=out,
            resume=resume,
            save_every=save_every,
            on_step=reports.append,
            progress=not as_json,
        )
    _show(out, weights, reports, as_json=as_json)


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


def _check_writable(out: Path) -> None:
    """Find out now, not after hours of training."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = out.with_name(out.name + ".partial")
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}.") from error


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
