"""The blocks that the layer before selected in this step."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sparda_compile.graph.nodes import tensor_shape

if TYPE_CHECKING:
    from torch import fx

    from sparda_compile.hints.base import HintPoint

__all__ = ["PreviousLayerHint"]


class PreviousLayerHint:
    """Free predictor: neighbouring layers attend to similar blocks."""

    name: ClassVar[str] = "previous_layer"

    def emit(self, point: HintPoint) -> fx.Node | None:
        """Return the ids of the nearest sparse layer before; None for the first one."""
        before = [layer for layer in point.block_ids if layer < point.target.layer]
        if not before:
            return None
        ids = point.block_ids[max(before)]
        same = tensor_shape(ids) == tensor_shape(point.block_ids[point.target.layer])
        return ids if same else None
