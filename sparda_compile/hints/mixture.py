"""The two hints without training in one: what past steps predict, and the query computed early.

    mixed = share * (scores by the next layer's rehearsed query) + (1 - share) * (smoothed scores)

Each finds blocks that the other does not, and errs elsewhere: to fetch the best of the sum misses
less than either, and no more than both do one after the other, which fetch twice as much. The
share is learned while steps run, for each layer, sequence and KV head, from the scores of the
layer's own selection (`kernels/mixture.py`).

Its guess is made where `next_query` makes its own, one layer ahead; the first layer has none.
Levels begin as those of hint `ema`, whose weights and damping are its own.

Source: PRR (arXiv 2606.30389) section 4.1 for the levels, InfiniGen (arXiv 2406.19707) for the
query; the mixture is neither's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sparda_compile.graph.effects import argument
from sparda_compile.graph.writer import add_scores, add_selection
from sparda_compile.hints.ema import EmaHint, ema_weights, take_calibrated
from sparda_compile.hints.next_query import rehearsed_query
from sparda_compile.state.layout import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from sparda_compile.hints.base import HintPoint
    from sparda_compile.state.layout import CacheLayout, LayerShape

__all__ = ["MixtureHint"]


class MixtureHint(EmaHint):
    """Blocks that past steps and a query computed one layer early rank highest together."""

    name: ClassVar[str] = "mixture"
    # Of all blocks that are selected .83 to .87, measured as for `ema`.
    recall: ClassVar[float] = 0.85
    includes: ClassVar[tuple[str, ...]] = ("ema", "next_query")
    ops: ClassVar[tuple[str, ...]] = (
        "score_blocks",
        "mix_scores",
        "select_blocks",
        "learn_mixture",
        "update_prediction",
    )

    def state(self, layout: CacheLayout, layer: LayerShape) -> dict[str, TensorSpec]:
        """Return what `ema` keeps, and `mixture`, [B, G, 2] float32: 0 until it learns."""
        shape = (layout.batch_size, layer.num_groups, 2)
        return {**super().state(layout, layer), "mixture": TensorSpec(shape, torch.float32)}

    def source(self, target: LayerShape, layers: Sequence[LayerShape]) -> LayerShape | None:
        """Return the layer before; the first one has no guess."""
        before = [layer for layer in layers if layer.layer < target.layer]
        return before[-1] if before else None

    def emit(self, point: HintPoint) -> fx.Node | None:
        """Add query, scores, mixture and ids behind the input of the layer before.

        Behind the layer's attention, add what the next step is guessed by. None for the first one.

        Raises:
            PassError: If the input of the layer before is of another width.
        """
        query = rehearsed_query(point)
        if query is None:
            return None
        config, layout, layer = point.layout.config, point.layout, point.target.layer
        level, trend, mixture = (
            point.state.get(name, layer) for name in ("level", "trend", "mixture")
        )
        weights = ema_weights(layout)
        emit = point.after(query)
        made_of = (point.shape, point.state, layout)
        asked = add_scores(
            emit, query, config.selector, point.target.scale, *made_of, prefix=point.prefix
        )
        mixed = emit.call(
            "mix_scores", asked, level, trend, mixture, config.ema_damping, weights[2]
        )
        ids = add_selection(emit, mixed, *made_of, prefix=point.prefix)
        scores = argument(point.block_ids[layer], "scores")
        behind = point.after(point.last("sparse_attention"))
        learned = behind.call(
            "learn_mixture",
            *(scores, asked, level, trend, point.state.lengths, mixture),
            config.ema_damping,
            weights[2],
            config.block_size,
            config.sink_blocks,
            config.local_blocks,
        )
        updated = behind.call("update_prediction", scores, level, trend, *weights)
        for node in (mixed, learned, updated):
            take_calibrated(node, point)
        return ids
