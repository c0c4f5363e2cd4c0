"""What a training step reports, and what a measurement of held-out texts does."""

from __future__ import annotations

import dataclasses

__all__ = ["HeldOutReport", "StepReport"]


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What one optimizer step saw, on the first process.

    Attributes:
        step: Steps done, this one included.
        losses: Loss of each layer in nats, over all sequences of the step, before the update.
        recalls: Share of the true query's blocks that each layer's Forecast picks at equal
            budget, sink and local blocks left out; NaN where a sequence is too short for a choice.
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
