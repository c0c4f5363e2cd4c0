"""InsertForecast: guess a layer's blocks one layer ahead.

Mode `forecast`: the guess is the selection. Before, and after:

    %hidden_0 = ...                                   %hidden_0 = ...
                                                      %forecast_1 = linear(%hidden_0, %W_1)
                                                      %view, %transpose, rotation of layer 1
    ...                                               ...
    %scores_1 = score_blocks(%q_1, .., "infllm2")     %scores_1 = score_blocks(%f_1, .., "forecast")

A projection of low rank is two matrices: `%forecast_1_v = linear(%hidden_0, %V_1)` and
`%forecast_1_u = linear(%forecast_1_v, %U_1)`.

Mode `exact`: the layer's own query still selects; the hint's ids are computed beside it, for
InsertPrefetch to fetch early:

    %hint_scores_1 = score_blocks(%f_1, ..., "forecast")
    %hint_block_ids_1 = select_blocks(%hint_scores_1, ...)

Decode only: prefill attends densely. The layer behind a window layer takes its input from that
one. Modes `query` and `dense` are left alone.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Final

from sparda_compile import hints  # whole, since hints import this package
from sparda_compile.graph.effects import set_argument
from sparda_compile.graph.nodes import find_ops
from sparda_compile.graph.site import sites_of
from sparda_compile.graph.writer import StateInputs
from sparda_compile.hints.forecast import emit_forecast
from sparda_compile.passes.base import Fact, PassContext, PassResult

if TYPE_CHECKING:
    from torch import fx

__all__ = ["HINT_KEY", "InsertForecast"]

# Marks the ids of a hint with the layer that they are for.
HINT_KEY: Final = "sparda_hint_for"


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
        if not ctx.is_decode or ctx.config.mode not in ("forecast", "exact"):
            return PassResult(gm, modified=False, counts=counts)
        for point in _points(gm.graph, ctx):
            is_first = point.source is point.target
            if ctx.config.mode == "forecast":
                scores = point.block_ids[point.target.layer].args[0]
                forecast = emit_forecast(point)
                set_argument(scores, "query", forecast)  # type: ignore[arg-type]
                set_argument(scores, "selector", ctx.config.forecast_selector)  # type: ignore[arg-type]
                set_argument(scores, "scale", 1.0)  # type: ignore[arg-type]
                counts["bootstraps" if is_first else "forecasts"] += 1
                continue
            ids = hints.HINTS[ctx.config.hint].emit(point)
            if ids is not None:
                ids.meta.setdefault(HINT_KEY, []).append(point.target.layer)
                counts["hints"] += 1
        return PassResult(gm, modified=True, counts=counts)


def _points(graph: fx.Graph, ctx: PassContext) -> list[hints.HintPoint]:
    assert ctx.layout is not None
    sites = sites_of(graph)
    shapes = {shape.layer: shape for shape in ctx.layout.layers}
    state = StateInputs(graph, ctx.layout)
    block_ids = {n.meta["sparda_layer"]: n for n in find_ops(graph, "select_blocks")}
    before = [sites[0], *sites[:-1]]
    return [
        hints.HintPoint(graph, source, site, block_ids, shapes[site.layer], state, ctx.layout)
        for source, site in zip(before, sites, strict=True)
        if not site.window
    ]
