"""The blocks that the layer before selected in this step."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sparda_compile.graph.nodes import tensor_shape
from sparda_compile.hints.base import Hint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from sparda_compile.hints.base import HintPoint
    from sparda_compile.state.layout import LayerShape

__all__ = ["PreviousLayerHint"]


class PreviousLayerHint(Hint):
    """Free predictor: neighbouring layers attend to similar blocks."""

    name: ClassVar[str] = "previous_layer"
    borrows_ids: ClassVar[bool] = True
    # .10 to .19 of all blocks that are selected, by `sparda eval` of two small models:
    # benchmarks/results/2026-11-25-h200-eval-*.json.
    recall: ClassVar[float] = 0.15

    def source(self, target: LayerShape, layers: Sequence[LayerShape]) -> LayerShape | None:
        """Return the nearest sparse layer before, if it has as many KV heads."""
        before = [s for s in layers if s.layer < target.layer and s.kind != "window"]
        same = before and before[-1].num_groups == target.num_groups
        return before[-1] if same else None

    def emit(self, point: HintPoint) -> fx.Node | None:
        """Return the ids of the nearest sparse layer before; None for the first one."""
        before = [layer for layer in point.block_ids if layer < point.target.layer]
        if not before:
            return None
        ids = point.block_ids[max(before)]
        same = tensor_shape(ids) == tensor_shape(point.block_ids[point.target.layer])
        return ids if same else None
