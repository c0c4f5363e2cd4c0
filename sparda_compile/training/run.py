"""`train_forecast`: a training from its first step, or a checkpoint, to a file of weights."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.training import parallel
from sparda_compile.training.checkpoint import Checkpoint, checkpoint_path
from sparda_compile.training.data import endless
from sparda_compile.training.progress import step_bar
from sparda_compile.training.trainer import ForecastTrainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch import Tensor, nn

    from sparda_compile.forecast.weights import ForecastWeights
    from sparda_compile.training.names import Teacher
    from sparda_compile.training.report import HeldOutReport, StepReport

__all__ = ["train_forecast"]

_log = logging.getLogger(__name__)


def train_forecast(
    model: nn.Module,
    token_batches: Iterable[Tensor],
    *,
    config: SpardaConfig | None = None,
    steps: int = 2000,
    lr: float = 5e-4,
    accumulate: int = 1,
    last_tokens: int | None = None,
    teacher: Teacher = "attention",
    out: str | Path | None = None,
    resume: str | Path | None = None,
    save_every: int = 50,
    held_out: Iterable[Tensor] | None = None,
    measure_every: int = 100,
    on_measure: Callable[[HeldOutReport], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    progress: bool = True,
) -> ForecastWeights:
    """Train the Forecast projections of a model; the model itself is left as it is.

    They start from the mean of the query heads of each group; a warning names layers for which
    there is none, which start from random weights.

    Under `torchrun` every process takes its own batches out of the same iterable and gradients
    are averaged, so a step sees `accumulate` batches of each. Of a model that is sharded over some
    of the processes, these take the same batches, and the others are replicas.

    Args:
        model: What `optimize` takes, or what it returned, in eval mode; on the CPU or a GPU.
        token_batches: Token ids [B, T] int64 without padding. Gone through again when it ends and
            can be; see `sparda_compile.training.data` for texts and data sets.
        config: Sizes of blocks and pooled keys and `top_k`; None is `SpardaConfig()`. Use the
            same ones in `optimize`.
        steps: Optimizer steps in all, those before a resumption included.
        lr: Learning rate, constant.
        accumulate: Batches per step and process, or replica.
        last_tokens: Tokens at the end of each sequence to learn from, None for all: those like
            the ones that will be decoded, where a Forecast is used. Fewer make a cheaper step.
        teacher: What to learn: `attention`, where the layer's attention goes, as in SparDA, or
            `query`, what its own query would choose, for a hint of mode `exact`.
        out: Safetensors file to write; a checkpoint is kept beside it, and written before a
            KeyboardInterrupt goes on to the caller.
        resume: Checkpoint to go on from.
        save_every: Steps between checkpoints.
        held_out: Token ids that are measured and not learned from, as `token_batches`; None for
            none. The first process, or replica, measures them alone.
        measure_every: Steps between two measurements of them; the first is before the first step,
            the last behind the last one.
        on_measure: Called after each measurement.
        on_step: Called after each step, on the first process.
        on_batch: Called after each batch, with how many of the step are done and the steps before.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        The projections by target layer, float32; pass them to `optimize(forecast=...)`.

    Raises:
        ConfigError: If a number is not allowed, the checkpoint does not fit, or the batches end.
        UnsupportedInputError: If the model or a batch cannot be trained on.
        RanksDisagreeError: If processes that share the model get other batches.
        CaptureError: If the model's forward cannot be traced as one graph.
        AttentionNotFoundError: If it has no attention, or one that is not implemented.
    """
    _at_least_one(steps=steps, accumulate=accumulate, last_tokens=last_tokens)
    _at_least_one(save_every=save_every, measure_every=measure_every)
    trainer = ForecastTrainer(
        model, config or SpardaConfig(), lr, last_tokens=last_tokens, teacher=teacher
    )
    num_used = _resume(trainer, resume, steps)
    first = trainer.steps_done
    measured = _HeldOut(held_out, measure_every, on_measure)

    def save() -> None:
        if out is not None and parallel.rank() == 0 and trainer.steps_done > first:
            used = num_used + (trainer.steps_done - first) * accumulate * replicas.count
            trainer.checkpoint(used).save(checkpoint_path(out))

    with parallel.process_group(trainer.device), step_bar(steps, shown=progress) as advance:
        replicas = trainer.replicas
        batches = endless(token_batches, num_used, replicas.number, replicas.count)
        try:
            measured.look(trainer, is_end=True)
            while trainer.steps_done < steps:
                taken = [next(batches) for _ in range(accumulate)]
                report = trainer.step(taken, on_batch)
                if not parallel.rank():
                    _log.debug(
                        "step %d: loss %.4f, recall %.3f", report.step, report.loss, report.recall
                    )
                    advance(report)
                    if on_step is not None:
                        on_step(report)
                    if report.step % save_every == 0 or report.step == steps:
                        save()
                measured.look(trainer, is_end=report.step == steps)
        except KeyboardInterrupt:
            save()
            raise
        weights = trainer.forecast()
        if out is not None and parallel.rank() == 0:
            weights.save(out)
    return weights


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    """Texts to measure, how often, and who is told."""

    batches: Iterable[Tensor] | None
    every: int
    on_measure: Callable[[HeldOutReport], None] | None

    def look(self, trainer: ForecastTrainer, *, is_end: bool) -> None:
        """Measure them, if there are any and it is time; of several replicas, the first one."""
        is_time = is_end or trainer.steps_done % self.every == 0
        if self.batches is None or trainer.replicas.number or not is_time:
            return
        found = trainer.measure(self.batches)
        if parallel.rank():
            return
        _log.debug("held out, step %d: recall %.3f", found.step, found.recall)
        if self.on_measure is not None:
            self.on_measure(found)


def _at_least_one(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is too small; use 1 or more.")


def _resume(trainer: ForecastTrainer, resume: str | Path | None, steps: int) -> int:
    """Go on from a checkpoint, if one is given; returns the batches used before."""
    if resume is None:
        return 0
    checkpoint = Checkpoint.load(resume)
    if checkpoint.step >= steps:
        raise ConfigError(
            f"resume={str(resume)!r} has done {checkpoint.step} steps, so there are none left of "
            f"steps={steps}; raise steps."
        )
    trainer.restore(checkpoint)
    return checkpoint.num_batches
