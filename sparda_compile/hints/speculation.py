"""The predictor of mode `speculate`: what hint `ema` knows, and the blocks that follow from it.

    level, trend   smoothed scores of past steps, as in `ema.py`
    predicted      the blocks that the next step begins its attention with
    budget         how many of them there may be; read on the device, so it may change at any time

Both are renewed behind a layer's attention, on the attend stream: the prediction for a step is
there before it begins.

Source: PRR (arXiv 2606.30389) sections 4.1 and 4.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sparda_compile.graph.effects import argument
from sparda_compile.hints.ema import EmaHint, ema_weights, take_calibrated
from sparda_compile.isa.streams import ATTEND, COMPUTE
from sparda_compile.state.layout import TensorSpec

if TYPE_CHECKING:
    from torch import fx

    from sparda_compile.graph.emit import Emitter
    from sparda_compile.hints.base import HintPoint
    from sparda_compile.state.layout import CacheLayout, LayerShape

__all__ = ["EmaPredictor"]

# New tokens of a decode step, and those that `totals` of a prompt has counted already.
_DECODED, _COUNTED = 1, 0


class EmaPredictor(EmaHint):
    """Blocks whose smoothed score in the steps before is highest, kept for the next step."""

    ops: ClassVar[tuple[str, ...]] = ("update_prediction", "predict_ahead")
    prompt_ops: ClassVar[tuple[str, ...]] = ("begin_prediction", "predict_ahead")
    dense_prompt_ops: ClassVar[tuple[str, ...]] = ("begin_prediction", "predict_ahead")

    def state(self, layout: CacheLayout, layer: LayerShape) -> dict[str, TensorSpec]:
        """Return level and trend, `predicted` [B, G, W] int32 and `budget` [1] int32."""
        shape = (layout.batch_size, layer.num_groups, layout.num_predicted)
        most = layout.config.prediction_budget(layout.num_blocks)
        return {
            **super().state(layout, layer),
            "predicted": TensorSpec(shape, torch.int32, fill=-1),
            "budget": TensorSpec((1,), torch.int32, fill=most, is_shared=True),
        }

    def emit_step(self, point: HintPoint, emit: Emitter) -> list[fx.Node]:
        """Add what a decode step leaves for the next one, on the attend stream.

        Args:
            point: The layer.
            emit: Where the nodes go.

        Returns:
            The nodes, in order.
        """
        layer = point.target.layer
        kept = [point.state.get(name, layer) for name in ("level", "trend")]
        scores = argument(point.block_ids[layer], "scores")
        update = emit.call(
            "update_prediction", scores, *kept, *ema_weights(point.layout), stream=ATTEND
        )
        take_calibrated(update, point)
        return [update, _predict(point, emit, point.state.lengths, _DECODED, ATTEND)]

    def emit_prompt(self, point: HintPoint) -> None:
        """Add the levels of the prompt's last tokens, and the prediction for the first step."""
        super().emit_prompt(point)
        emit = point.after(point.last("begin_prediction"))
        _predict(point, emit, point.state.tokens()[2], _COUNTED, COMPUTE)


def _predict(
    point: HintPoint, emit: Emitter, lengths: fx.Node, num_new: int, stream: int
) -> fx.Node:
    config, layer = point.layout.config, point.target.layer
    level, trend, budget, predicted = (
        point.state.get(name, layer) for name in ("level", "trend", "budget", "predicted")
    )
    predict = emit.call(
        "predict_ahead",
        level,
        trend,
        lengths,
        budget,
        predicted,
        num_new,
        config.block_size,
        config.sink_blocks,
        config.local_blocks,
        config.ema_damping,
        stream=stream,
    )
    take_calibrated(predict, point)
    return predict
