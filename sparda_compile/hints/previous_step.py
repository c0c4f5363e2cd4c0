"""The blocks that this layer selected in the step before."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sparda_compile.hints.base import Hint
from sparda_compile.state.layout import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from sparda_compile.hints.base import HintPoint
    from sparda_compile.state.layout import CacheLayout, LayerShape

__all__ = ["PreviousStepHint"]


class PreviousStepHint(Hint):
    """Free predictor: consecutive tokens attend to similar blocks.

    With at least as many pages as selected blocks these are resident already, so this hint moves
    bytes only after something else took their pages.
    """

    name: ClassVar[str] = "previous_step"
    # By what it is: it names blocks that were selected before, which have a page.
    recall: ClassVar[float] = 0.0
    fetched: ClassVar[float] = 0.0
    ops: ClassVar[tuple[str, ...]] = ("recall_ids", "remember_ids")
    prompt_ops: ClassVar[tuple[str, ...]] = ("remember_last",)

    def state(self, layout: CacheLayout, layer: LayerShape) -> dict[str, TensorSpec]:
        """Return the ids of the last step, [B, G, K] int32."""
        shape = (layout.batch_size, layer.num_groups, layout.num_selected)
        return {"last_block_ids": TensorSpec(shape, torch.int32, fill=-1)}

    def source(self, target: LayerShape, layers: Sequence[LayerShape]) -> LayerShape | None:
        """Return the layer itself: nothing of this step is used."""
        del layers
        return target

    def emit(self, point: HintPoint) -> fx.Node | None:
        """Add the recall before all else, and the memory of this step's ids."""
        layer = point.target.layer
        last = point.state.get("last_block_ids", layer)
        recalled = point.first().call("recall_ids", last)
        ids = point.block_ids[layer]
        point.after(ids).call("remember_ids", ids, last)
        return recalled

    def emit_prompt(self, point: HintPoint) -> None:
        """Add the memory of what the last token of the prompt has selected."""
        layer, state = point.target.layer, point.state
        ids = point.block_ids.get(layer)
        if ids is None:  # a dense prefill selects nothing
            return
        last = state.get("last_block_ids", layer)
        point.after(ids).call("remember_last", ids, state.tokens()[0], last)
