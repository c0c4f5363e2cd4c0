"""PRR's predictor: each block's score in the steps before, smoothed.

    prediction = level + damping * trend                          of the steps before this one
    trend      = b * (score - level) + (1 - b) * trend            by the level as it was
    level      = a * score + (1 - a) * level

The scores are those of the layer's own selection, which every step computes anyway. So the
prediction for a step exists at the end of the step before, for all layers at once, and its copy may
start anywhere before the layer. The levels begin as those of the last tokens of the prompt.

With `ema_calibrate` the end of each prompt decides by which weights and damping (section 4.2).

Source: PRR (arXiv 2606.30389) sections 4.1 and 4.2. Differs from the paper: no trend by default
(`ema_damping` 0.0), for a real model is predicted better without; scores that cannot be compared
between steps are standardised in each step; the levels begin from the last 32 tokens of a prompt,
or from the 64 by which it is calibrated. That is off by default: on a real model it found no better
blocks than the same weights for all layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sparda_compile.graph.effects import argument, set_argument
from sparda_compile.graph.writer import geometry_of
from sparda_compile.hints.base import Hint
from sparda_compile.selectors import SELECTORS
from sparda_compile.state.layout import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from sparda_compile.hints.base import HintPoint
    from sparda_compile.state.layout import CacheLayout, LayerShape

__all__ = ["EmaHint", "ema_weights", "take_calibrated"]


class EmaHint(Hint):
    """Blocks whose smoothed score in the steps before is highest."""

    name: ClassVar[str] = "ema"
    # Of all blocks that are selected .72 to .77, on three texts read by a trained model of 135M
    # parameters, at a tenth of the blocks; taken to be as much of those that are new.
    recall: ClassVar[float] = 0.75
    ops: ClassVar[tuple[str, ...]] = ("predict_blocks", "update_prediction")
    prompt_ops: ClassVar[tuple[str, ...]] = ("begin_prediction",)
    dense_prompt_ops: ClassVar[tuple[str, ...]] = ("begin_prediction",)

    def state(self, layout: CacheLayout, layer: LayerShape) -> dict[str, TensorSpec]:
        """Return level and trend, [B, G, N] float32; a block without a score has level -inf.

        If prompts are calibrated, also what to: `calibrated`, [B, 3] float32, 0 before that.
        """
        shape = (layout.batch_size, layer.num_groups, layout.num_blocks)
        kept = {
            "level": TensorSpec(shape, torch.float32, fill=float("-inf")),
            "trend": TensorSpec(shape, torch.float32),
        }
        if layout.config.ema_calibrate:
            kept["calibrated"] = TensorSpec((layout.batch_size, 3), torch.float32)
        return kept

    def source(self, target: LayerShape, layers: Sequence[LayerShape]) -> LayerShape | None:
        """Return the layer itself: nothing of this step is used."""
        del layers
        return target

    def emit(self, point: HintPoint) -> fx.Node | None:
        """Add the prediction before all else, and the update behind the layer's attention.

        `InsertPrefetch` lets that run beside the model.
        """
        config, layer = point.layout.config, point.target.layer
        kept = [point.state.get(name, layer) for name in ("level", "trend")]
        predicted = point.first().call(
            "predict_blocks",
            *kept,
            point.state.lengths,
            point.layout.num_selected,
            config.block_size,
            config.sink_blocks,
            config.local_blocks,
            config.ema_damping,
        )
        scores = argument(point.block_ids[layer], "scores")
        updated = point.after(point.last("sparse_attention")).call(
            "update_prediction", scores, *kept, *ema_weights(point.layout)
        )
        for node in (predicted, updated):
            take_calibrated(node, point)
        return predicted

    def emit_prompt(self, point: HintPoint) -> None:
        """Add the levels of the prompt's last tokens, by what the summary then holds."""
        layout, target, state = point.layout, point.target, point.state
        config = layout.config
        summary = SELECTORS[config.selector].summary.name
        names = (*layout.summary_tensors(summary, point.shape), "level", "trend")
        *tensors, level, trend = (state.get(name, target.layer) for name in names)
        calibrated = state.get("calibrated", target.layer) if config.ema_calibrate else None
        begun = point.after(point.last("update_summary")).call(
            "begin_prediction",
            target.query,
            tensors,
            *state.tokens()[1:],
            state.lengths,
            level,
            trend,
            calibrated,
            config.selector,
            target.scale,
            *geometry_of(layout),
            *ema_weights(layout),
        )
        if layout.geometry.short_list:
            for name in ("short_list", "sink_blocks", "local_blocks"):
                set_argument(begun, name, getattr(layout.geometry, name))
        if config.ema_calibrate:
            set_argument(begun, "num_selected", layout.num_selected)
            for name in ("sink_blocks", "local_blocks"):
                set_argument(begun, name, getattr(config, name))


def take_calibrated(node: fx.Node, point: HintPoint) -> None:
    """Give an op of the predictor what the prompt is calibrated to, if prompts are."""
    if point.layout.config.ema_calibrate:
        set_argument(node, "calibrated", point.state.get("calibrated", point.target.layer))


def ema_weights(layout: CacheLayout) -> tuple[float, float, bool]:
    """Return both weights of a new score, and whether scores can be compared between steps."""
    config = layout.config
    return config.ema_level, config.ema_trend, SELECTORS[config.selector].is_comparable
