"""What a training step reports, and what a measurement of held-out texts does."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["HeldOutReport", "StepReport", "tokens_per_s"]


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What one optimizer step saw, on the first process.

    Attributes:
        step: Steps done, this one included.
        losses: Loss of each layer in nats, over all sequences of the step, before the update.
        recalls: Share of the true query's blocks that each layer's Forecast picks at equal
            budget, sink and local blocks left out; NaN where a sequence is too short for a choice.
            Of several replicas, each one says it of some layers, on its own sequences.
        gradient_norm: Norm of the gradient before clipping.
        num_tokens: Tokens of the step, over all processes.
        seconds: Time that the step took.
    """

    step: int
    losses: dict[int, float]
    recalls: dict[int, float]
    gradient_norm: float
    num_tokens: int
    seconds: float

    @property
    def loss(self) -> float:
        """Mean over the layers."""
        return sum(self.losses.values()) / len(self.losses)

    @property
    def recall(self) -> float:
        """Mean over the layers."""
        return sum(self.recalls.values()) / len(self.recalls)

    @property
    def tokens_per_s(self) -> float:
        """Tokens that all processes learned from, in a second."""
        return self.num_tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class HeldOutReport:
    """What the projections make of texts that are not learned from.

    Attributes:
        step: Steps done before it.
        losses: Loss of each layer in nats, mean of the batches.
        recalls: As those of a step, mean of the batches.
        num_tokens: Tokens of all batches.
    """

    step: int
    losses: dict[int, float]
    recalls: dict[int, float]
    num_tokens: int

    @property
    def loss(self) -> float:
        """Mean over the layers."""
        return sum(self.losses.values()) / len(self.losses)

    @property
    def recall(self) -> float:
        """Mean over the layers."""
        return sum(self.recalls.values()) / len(self.recalls)


def tokens_per_s(reports: Sequence[StepReport]) -> float:
    """Return the tokens of all processes in a second.

    Args:
        reports: Of steps, one at least; the first one, which compiles kernels, counts if it is the
            only one.
    """
    warm = reports[1:] or reports
    return sum(report.num_tokens for report in warm) / sum(report.seconds for report in warm)
