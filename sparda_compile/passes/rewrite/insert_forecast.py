"""InsertForecast: guess a layer's blocks one layer ahead.

Mode `forecast`: the guess is the selection. Before, and after:

    %hidden_0 = ...                                   %hidden_0 = ...
                                                      %forecast_1 = linear(%hidden_0, %W_1)
                                                      %view, %transpose, rotation of layer 1
    ...                                               ...
    %scores_1 = score_blocks(%q_1, .., "infllm2")     %scores_1 = score_blocks(%f_1, .., "forecast")

A projection of low rank is two matrices: `%forecast_1_v = linear(%hidden_0, %V_1)` and
`%forecast_1_u = linear(%forecast_1_v, %U_1)`.

Mode `exact`: the layer's own query still selects; the ids of each hint are computed beside it, for
InsertPrefetch to fetch early:

    %hint_scores_1 = score_blocks(%f_1, ..., "forecast")
    %hint_block_ids_1 = select_blocks(%hint_scores_1, ...)

In a sparse prefill each token's Forecast selects. A hint guesses nothing in a prefill, but may keep
what the first step will want. The layer behind a window layer takes its input from that one.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, cast

from sparda_compile.graph.effects import set_argument
from sparda_compile.graph.nodes import find_ops
from sparda_compile.graph.tags import HINT, HINTS, LAYER
from sparda_compile.hints.base import hint_points
from sparda_compile.hints.forecast import emit_forecast
from sparda_compile.passes.base import Fact, PassContext, PassResult

if TYPE_CHECKING:
    from torch import fx

    from sparda_compile.hints.base import Hint, HintPoint
    from sparda_compile.state.strategy import HintMethod

__all__ = ["InsertForecast"]


@dataclasses.dataclass(frozen=True)
class InsertForecast:
    """Add Forecasts or hints. Counts: forecasts, bootstraps, hints."""

    name: ClassVar[str] = "insert_forecast"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ATTENTION_REPLACED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.FORECAST_INSERTED})
    preserves_numerics: ClassVar[bool] = False

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Rewrite the graph in place."""
        counts = {"forecasts": 0, "bootstraps": 0, "hints": 0}
        strategy = ctx.strategy
        selects = ctx.is_decode or ctx.is_sparse_prefill
        if not (strategy.selects_by_forecast and selects) and not strategy.hints:
            return PassResult(gm, modified=False, counts=counts)
        assert ctx.layout is not None
        selection = "select_blocks" if ctx.is_decode else "select_tokens"
        scorer = (strategy if ctx.is_decode else strategy.in_prompts).forecast_selector
        block_ids = {LAYER.of(n): n for n in find_ops(gm.graph, selection)}
        for point in hint_points(gm.graph, ctx.layout, block_ids):
            is_first = point.source is point.target
            if strategy.selects_by_forecast:
                assert scorer is not None
                selection_of = point.block_ids[point.target.layer]
                scores = selection_of.args[0] if ctx.is_decode else selection_of
                forecast = emit_forecast(point)
                set_argument(scores, "query", forecast)  # type: ignore[arg-type]
                set_argument(scores, "selector", scorer.name)  # type: ignore[arg-type]
                set_argument(scores, "scale", point.target.scale)  # type: ignore[arg-type]
                counts["bootstraps" if is_first else "forecasts"] += 1
                continue
            counts["hints"] += sum(_add_hint(hint, point, ctx) for hint in reversed(strategy.hints))
        return PassResult(gm, modified=True, counts=counts)


def _add_hint(method: HintMethod, point: HintPoint, ctx: PassContext) -> int:
    """Add a hint's nodes; return how many guesses that are.

    Of hints that are made at one place, the last that is added stands first.
    """
    hint, layer = cast("Hint", method), point.target.layer
    if len(ctx.strategy.hints) > 1:
        point = dataclasses.replace(point, prefix=f"{hint.name}_")
    if not ctx.is_decode:
        hint.emit_prompt(point)
        return 0
    ids = hint.emit(point)
    if ids is None:
        return 0
    HINTS.put(ids, [*HINTS.get(ids, []), (hint.name, layer)])
    stack = [ids]
    while stack:
        node = stack.pop()
        if LAYER.get(node) == layer and node.op != "placeholder" and not HINT.on(node):
            HINT.put(node, hint.name)
            stack += node.all_input_nodes
    return 1
