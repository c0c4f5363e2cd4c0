"""The blocks that this layer selected in the step before."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import fx

    from sparda_compile.hints.base import HintPoint

__all__ = ["PreviousStepHint"]


class PreviousStepHint:
    """Free predictor: consecutive tokens attend to similar blocks.

    With at least as many pages as selected blocks these are resident already, so this hint moves
    bytes only after something else took their pages.
    """

    name: ClassVar[str] = "previous_step"

    def emit(self, point: HintPoint) -> fx.Node | None:
        """Add the recall before the layer before, and the memory of this step's ids."""
        layer = point.target.layer
        last = point.state.get("last_block_ids", layer)
        recalled = point.after(point.source.hidden).call("recall_ids", last)
        ids = point.block_ids[layer]
        point.after(ids).call("remember_ids", ids, last)
        return recalled
