"""The prefill graph as a training forward: every attention dense, every Forecast tapped.

Begins with the sites that `FindAttention` tags, so what `optimize` takes can be trained. Before:

    %kv_update = sparda.kv_update(%k, %v, 1)
    %attn = scaled_dot_product_attention(%q, %key, %value, attn_mask=%mask)

and after:

    %forecast_1 = rotation of layer 1(linear(%hidden_0, %sparda_forecast_1))
    %tap = call_module[sparda_tap_1](%forecast_1, %q, %k)
    %attn = causal_attention(%q, %k, %v, scale, softcap, window)

The Forecast is made by `hints.forecast.emit_forecast`, as for a decode step: what is trained is
what is deployed. Nothing behind the last tap is left, so neither the last MLP nor the head runs. No
weight of the model needs a gradient, so autograd keeps nothing but the input of each projection,
until the tap of the layer has sent its loss back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, fx, nn

from sparda_compile.config import round_up
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.forecast.projection import Projection, ProjectionShape, from_inputs, to_inputs
from sparda_compile.graph.nodes import changes_in_place, fake_value
from sparda_compile.graph.site import AttentionSite, sites_of
from sparda_compile.hints.base import hint_points
from sparda_compile.hints.forecast import emit_forecast
from sparda_compile.sizes import BATCH_SIZE, NUM_TOKENS
from sparda_compile.training.attention import causal_attention

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparda_compile.config import SpardaConfig
    from sparda_compile.program.captures import Captures

__all__ = ["Listener", "TappedForward", "tap_forward"]

Listener = Callable[[AttentionSite, Tensor, Tensor, Tensor], None]
"""Takes a site, its Forecast [B, G*F, T, D], its query [B, H, T, D] and its keys [B, G, T, D]."""

_PLANNED_TOKENS: Final = 4096


class _Tap(nn.Module):
    """Hands one layer's tensors to the listener of the moment."""

    def __init__(self, site: AttentionSite) -> None:
        super().__init__()
        self.site = site
        self.listener: Listener | None = None

    def forward(self, forecast_BGTD: Tensor, query_BHTD: Tensor, k_BGTD: Tensor) -> None:
        """Call the listener, if there is one."""
        if self.listener is not None:
            self.listener(self.site, forecast_BGTD, query_BHTD, k_BGTD)


@dataclasses.dataclass(frozen=True)
class TappedForward:
    """A model's forward over whole sequences, up to the last layer that has a Forecast.

    Attributes:
        graph_module: The rewritten graph.
        sites: The layers that have a Forecast, in order.
        shapes: Sizes of each projection, by target layer.
        taps: The module that listens at each layer.
        arguments: For each placeholder its value, or the name of what a call passes in.
    """

    graph_module: fx.GraphModule
    sites: tuple[AttentionSite, ...]
    shapes: dict[int, ProjectionShape]
    taps: tuple[_Tap, ...]
    arguments: tuple[Tensor | str, ...]

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        forecast: Mapping[int, Projection],
        listener: Listener | None,
    ) -> None:
        """Run the model.

        Args:
            input_ids: [B, T] int64, all of them real tokens; B as traced.
            position_ids: [B, T] int64.
            forecast: Projections by target layer, in the model's dtype.
            listener: Called once per layer, in order, while the model runs; None runs the
                backbone alone.
        """
        call: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            BATCH_SIZE: input_ids.shape[0],
            NUM_TOKENS: input_ids.shape[1],
            **to_inputs(forecast),
        }
        for tap in self.taps:
            tap.listener = listener
        try:
            self.graph_module(*[call[a] if isinstance(a, str) else a for a in self.arguments])
        finally:
            for tap in self.taps:
                tap.listener = None


def tap_forward(captures: Captures, config: SpardaConfig, batch_size: int) -> TappedForward:
    """Build the training forward of a model for one batch size.

    Args:
        captures: The traced model.
        config: Sizes of blocks and windows.
        batch_size: Sequences of a batch.

    Raises:
        AttentionNotFoundError: If the model has no attention, or one that is not implemented.
        PassError: If a rotation cannot be applied to a Forecast.
        UnsupportedInputError: If every attention has a sliding window.
    """
    found = captures.sites("prefill", config)
    captured, gm = found.captured, found.copy()
    layout = found.layout(batch_size, round_up(_PLANNED_TOKENS, config.block_size)).traced()
    points = hint_points(gm.graph, layout)
    if not points:
        raise UnsupportedInputError(
            f"{captures.model_name} has a sliding window in every attention; such layers stay "
            "dense and use no Forecast, so there is nothing to train. Use mode='dense'."
        )
    taps = []
    for point in points:
        tap = _Tap(point.target)
        gm.add_submodule(f"sparda_tap_{point.target.layer}", tap)
        taps.append(tap)
        _insert_tap(gm.graph, point.target, emit_forecast(point))
    for site in sites_of(gm.graph):
        _attend_densely(gm.graph, site)
    _prune(gm.graph)
    gm.graph.lint()
    gm.recompile()
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    projections = from_inputs({n.name: fake_value(n) for n in placeholders})
    return TappedForward(
        gm,
        tuple(point.target for point in points),
        {layer: projection.shape for layer, projection in projections.items()},
        tuple(taps),
        tuple(_argument(n, captured.inputs, captured.weights) for n in placeholders),
    )


def _insert_tap(graph: fx.Graph, site: AttentionSite, forecast: fx.Node) -> None:
    with graph.inserting_before(site.anchor):
        graph.call_module(f"sparda_tap_{site.layer}", (forecast, site.query, site.k))


def _attend_densely(graph: fx.Graph, site: AttentionSite) -> None:
    old = site.anchor
    args = (site.query, site.k, site.v, site.scale, site.softcap, site.window)
    with graph.inserting_before(old):
        new = graph.call_function(causal_attention, args)
    # Not propagated: on symbolic lengths its loop over tiles would have to know them.
    new.meta = {key: value for key, value in old.meta.items() if key != "sparda"}
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _prune(graph: fx.Graph) -> None:
    """Return nothing from the graph, and erase what no tap needs."""
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (None,)
    for node in reversed(graph.nodes):
        if node.users or node.op in ("placeholder", "output", "call_module"):
            continue
        if not changes_in_place(node):
            graph.erase_node(node)


def _argument(
    node: fx.Node, inputs: Mapping[str, str], weights: Mapping[str, Tensor]
) -> Tensor | str:
    """Return a weight, or the name of what a call passes in."""
    if node.name in weights:
        return weights[node.name].detach()
    return inputs.get(node.name, node.name)
