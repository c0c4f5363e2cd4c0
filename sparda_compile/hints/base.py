"""What a hint is: nodes that guess a layer's blocks before its query exists."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.nodes import find_ops
from sparda_compile.graph.site import AttentionSite, sites_of
from sparda_compile.graph.tags import LAYER
from sparda_compile.graph.writer import StateInputs
from sparda_compile.state.strategy import HintMethod

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import fx

    from sparda_compile.state.layout import CacheLayout, LayerShape

__all__ = ["Hint", "HintPoint", "Predictor", "hint_points", "late_inputs"]


@dataclasses.dataclass(frozen=True)
class HintPoint:
    """One layer that wants a hint, and where it can come from.

    Attributes:
        graph: The decode graph.
        source: Site of the layer before; the target itself for the first layer.
        target: Site whose blocks are guessed.
        block_ids: Nodes of the true selections, by layer; none in a dense prefill.
        shape: Shape of the target's cache.
        state: State tensors.
        layout: Sizes.
        prefix: What the names of a hint's nodes begin with, where they would be those of others.
    """

    graph: fx.Graph
    source: AttentionSite
    target: AttentionSite
    block_ids: dict[int, fx.Node]
    shape: LayerShape
    state: StateInputs
    layout: CacheLayout
    prefix: str = "hint_"

    def after(self, node: fx.Node) -> Emitter:
        """Return an emitter that adds nodes for the target right behind `node`."""
        return Emitter(self.graph, node.next, self.source.query, self.target.layer)

    def first(self) -> Emitter:
        """Return an emitter that adds nodes for the target before all of the model's own."""
        model = (n for n in self.graph.nodes if n.op != "placeholder" and not LAYER.on(n))
        return Emitter(self.graph, next(model), self.source.query, self.target.layer)

    def last(self, op: str) -> fx.Node:
        """Return the last op of that name in the target's layer."""
        return [n for n in find_ops(self.graph, op) if LAYER.of(n) == self.target.layer][-1]


def hint_points(
    graph: fx.Graph, layout: CacheLayout, block_ids: Mapping[int, fx.Node] | None = None
) -> list[HintPoint]:
    """Return where guesses come from and go to: each sparse layer, and the layer before it.

    Args:
        graph: A graph whose attentions are tagged.
        layout: Sizes of its cache.
        block_ids: Nodes of the true selections, by layer; None for none.
    """
    sites, state = sites_of(graph), StateInputs(graph, layout)
    shapes = {shape.layer: shape for shape in layout.layers}
    return [
        HintPoint(graph, before, site, dict(block_ids or {}), shapes[site.layer], state, layout)
        for before, site in zip([sites[0], *sites[:-1]], sites, strict=True)
        if not site.window
    ]


class Hint(HintMethod, Protocol):
    """Guesses the blocks of a layer before its query exists; see `HintMethod` for the rest."""

    def emit(self, point: HintPoint) -> fx.Node | None:
        """Add the nodes; return the ids [B, G, K] int32, or None if there is nothing to go by."""

    def emit_prompt(self, point: HintPoint) -> None:
        """Add what a prefill leaves behind for the first step; `block_ids` has a sparse one's."""


class Predictor(HintMethod, Protocol):
    """Predicts the blocks of the next step, which `attend_predicted` begins with.

    Of its state, `predicted` [B, G, W] int32 holds them, ascending, then -1.
    """

    def emit_step(self, point: HintPoint, emit: Emitter) -> list[fx.Node]:
        """Add, on the attend stream, what a decode step leaves for the next; return the nodes."""

    def emit_prompt(self, point: HintPoint) -> None:
        """Add what a prefill leaves behind for the first step."""


def late_inputs(
    region: Iterable[fx.Node], after: fx.Node, replaced: fx.Node, order: dict[fx.Node, int]
) -> set[fx.Node]:
    """Return a region to copy, with those of its inputs that are computed only later.

    Args:
        region: Nodes to copy.
        after: Node behind which the copies go.
        replaced: Input of the region that the copy does not have.
        order: Place of each node in the program.
    """
    place = order[after]
    wanted = set(region)
    stack = list(wanted)
    while stack:
        for node in stack.pop().all_input_nodes:
            if order[node] > place and node is not replaced and node not in wanted:
                wanted.add(node)
                stack.append(node)
    return wanted
