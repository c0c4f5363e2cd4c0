"""The rehearsal: the query of a layer, computed one layer early from the input of the layer before.

    q'[l] = rotation(W_q[l] h[l-1])        h feeds the query projection of the layer before

The residual stream changes little from layer to layer, so q' is close to the layer's own query; the
layer's own selector scores it. Everything between the layer's input and its query is copied:
projection, biases, norms, rotation at the token's own position. No training; one query projection
per layer more than the Forecast's few heads per group. The first layer has no layer before.

Source: InfiniGen (arXiv 2406.19707), attention rehearsal, as SparDA (arXiv 2606.04511) compares
with it. Differs from the paper: all channels are scored, over the selector's summary; there a
skewed part of them, over all tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sparda_compile.errors import PassError
from sparda_compile.graph.emit import clone_region
from sparda_compile.graph.nodes import nodes_between, program_order, tensor_shape
from sparda_compile.graph.writer import select_by_score
from sparda_compile.hints.base import Hint, late_inputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from sparda_compile.hints.base import HintPoint
    from sparda_compile.state.layout import LayerShape

__all__ = ["NextQueryHint", "rehearsed_query"]


class NextQueryHint(Hint):
    """Blocks that the layer's query, rehearsed on the input of the layer before, scores highest."""

    name: ClassVar[str] = "next_query"
    # Of all blocks that are selected .78 to .80, measured as for `ema`.
    recall: ClassVar[float] = 0.79
    ops: ClassVar[tuple[str, ...]] = ("score_blocks", "select_blocks")

    def source(self, target: LayerShape, layers: Sequence[LayerShape]) -> LayerShape | None:
        """Return the layer before; the first one has no guess."""
        before = [layer for layer in layers if layer.layer < target.layer]
        return before[-1] if before else None

    def emit(self, point: HintPoint) -> fx.Node | None:
        """Add query, scores and ids behind the input of the layer before; None for the first one.

        Raises:
            PassError: If the input of the layer before is of another width.
        """
        query = rehearsed_query(point)
        if query is None:
            return None
        return select_by_score(
            point.after(query),
            query,
            point.layout.config.selector,
            point.target.scale,
            point.shape,
            point.state,
            point.layout,
            prefix=point.prefix,
        )


def rehearsed_query(point: HintPoint) -> fx.Node | None:
    """Add the query of a layer, computed from the input of the layer before.

    Returns:
        [B, H, 1, D]; None for the first layer.

    Raises:
        PassError: If the input of the layer before is of another width.
    """
    source, target = point.source, point.target
    if source is target:
        return None
    here, there = tensor_shape(source.hidden), tensor_shape(target.hidden)
    if here != there:
        raise PassError(
            f"the query projection of layer {target.layer} reads {there}, but layer "
            f"{source.layer} has {here}; use hint='previous_step'."
        )
    order = program_order(point.graph)
    region = late_inputs(
        nodes_between(target.hidden, target.query), source.hidden, target.hidden, order
    )
    emit = point.after(source.hidden)
    return clone_region(region, order, {target.hidden: source.hidden}, emit)[target.query]
