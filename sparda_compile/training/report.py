"""What a training step reports."""

from __future__ import annotations

import dataclasses

__all__ = ["StepReport"]


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
