"""The Forecast: the layer before predicts this layer's query, by F heads per group.

    f = rope(W h)        h feeds the query projection of the layer before, W [G*F*D, hidden]

F is `SpardaConfig.forecast_heads`, 1 in SparDA. W is one matrix or the product of two
(`forecast/projection.py`), which are multiplied one by one. The rotation is this layer's own,
copied from its query's path, at the token's own position; no q/k norm, no bias. The first layer has
no layer before: a projection of its own input stands in.
As a hint all of it becomes one op, which may run beside the model
(`passes/rewrite/hint_pieces.py`).
Source: SparDA (arXiv 2606.04511), Forecast projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sparda_compile.errors import ConfigError, PassError
from sparda_compile.forecast.projection import ProjectionShape, graph_input
from sparda_compile.graph.emit import clone_region
from sparda_compile.graph.nodes import fake_value, program_order, tensor_shape
from sparda_compile.graph.site import forecast_dim
from sparda_compile.graph.writer import select_by_score
from sparda_compile.hints.base import Hint, late_inputs

if TYPE_CHECKING:
    from torch import fx

    from sparda_compile.config import SpardaConfig
    from sparda_compile.graph.site import AttentionSite
    from sparda_compile.hints.base import HintPoint

__all__ = ["ForecastHint", "emit_forecast"]


def emit_forecast(point: HintPoint) -> fx.Node:
    """Add the prediction of the target's query; returns [B, G*F, 1, D].

    Raises:
        ConfigError: If F does not divide the query heads of a group.
        PassError: If the rotation of the target's query cannot be applied to G*F heads.
    """
    source, target = point.source, point.target
    emit = point.after(source.hidden)
    batch, num_tokens, width = tensor_shape(source.hidden)
    config, dim = point.layout.config, forecast_dim(target)
    num_heads = target.num_groups * _heads_per_group(target, config)
    dtype = fake_value(source.hidden).dtype
    shape = ProjectionShape.of(
        num_heads * dim, int(width), config.forecast_rank, config.heads_of_forecast
    )
    projected = source.hidden
    for name, factor in reversed([*zip(shape.names(target.layer), shape.factors, strict=True)]):
        weight = point.state.add(graph_input(name), factor, dtype)
        projected = emit.function(
            torch.nn.functional.linear, (projected, weight), {}, f"forecast_{name}"
        )
    heads = emit.method("unflatten", projected, -1, (num_heads, dim))
    heads_first = tensor_shape(target.rotation_input)[1] == target.num_heads
    begin = emit.method("transpose", heads, 1, 2) if heads_first else heads
    if not target.rotation:
        return begin if heads_first else emit.method("transpose", begin, 1, 2)
    order = program_order(point.graph)
    region = late_inputs(target.rotation, source.hidden, target.rotation_input, order)
    try:
        copies = clone_region(region, order, {target.rotation_input: begin}, emit)
    except Exception as error:
        raise PassError(_no_rotation(target.layer, str(error))) from error
    rotated = copies[target.query]
    if tensor_shape(rotated) != (batch, num_heads, num_tokens, target.head_dim):
        raise PassError(_no_rotation(target.layer, f"it gives {tensor_shape(rotated)}"))
    return rotated


def _heads_per_group(target: AttentionSite, config: SpardaConfig) -> int:
    """Return F.

    Raises:
        ConfigError: If it does not divide the query heads of a group.
    """
    heads, of_group = config.heads_of_forecast, target.num_heads // target.num_groups
    if of_group % heads:
        allowed = [str(n) for n in range(1, of_group + 1) if of_group % n == 0]
        shared = f"{of_group} query heads share" if of_group > 1 else "one query head has"
        raise ConfigError(
            f"forecast_heads={heads} does not fit layer {target.layer}, where {shared} each KV "
            f"head: it has to divide them; use {' or '.join(allowed)}."
        )
    return heads


def _no_rotation(layer: int, reason: str) -> str:
    return (
        f"the rotation of layer {layer}'s query cannot be applied to the heads of a "
        f"Forecast: {reason}. Use mode='query', or mode='exact' with hint='previous_step'."
    )


class ForecastHint(Hint):
    """Blocks that the Forecast scores highest."""

    name: ClassVar[str] = "forecast"
    # Not measured on text: taken to be as good as `ema`, which was.
    recall: ClassVar[float] = 0.75
    needs_forecast: ClassVar[bool] = True
    ops: ClassVar[tuple[str, ...]] = ("score_blocks", "select_blocks")

    def emit(self, point: HintPoint) -> fx.Node | None:
        """Add forecast, scores and ids behind the input of the layer before."""
        forecast = emit_forecast(point)
        selector = point.layout.config.forecast_selector
        return select_by_score(
            point.after(forecast),
            forecast,
            selector,
            point.target.scale,
            point.shape,
            point.state,
            point.layout,
            prefix=point.prefix,
        )
