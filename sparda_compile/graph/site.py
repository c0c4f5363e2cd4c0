"""One attention of the model, as nodes of its graph."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import fx

from sparda_compile.graph.nodes import tensor_shape
from sparda_compile.graph.tags import SITE

if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["AttentionSite", "forecast_dim", "sites_of"]


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention of the model, as nodes of the graph.

    Attributes:
        layer: Index of the decoder layer.
        module: Path of the attention module.
        form: `sdpa` or `eager`.
        anchor: Node whose value is the attention output [B, H, T, D].
        query: [B, H, T, D], after rotation.
        k: New keys [B, G, T, D], after rotation.
        v: New values [B, G, T, D].
        hidden: [B, T, hidden], the tensor that feeds the query projection.
        projection: The linear that makes the query.
        rotation_input: Where the rotation of the query begins; `query` itself if there is none.
        rotation: Nodes from `rotation_input` (left out) to `query`.
        num_heads: H.
        num_groups: G.
        head_dim: D.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        window: Sliding window in tokens, 0 for none.
    """

    layer: int
    module: str
    form: str
    anchor: fx.Node
    query: fx.Node
    k: fx.Node
    v: fx.Node
    hidden: fx.Node
    projection: fx.Node
    rotation_input: fx.Node
    rotation: tuple[fx.Node, ...]
    num_heads: int
    num_groups: int
    head_dim: int
    scale: float
    softcap: float
    window: int

    @property
    def kind(self) -> str:
        """`window` for a sliding window, which stays dense; else `sparse`."""
        return "window" if self.window else "sparse"

    def mapped(self, change: Callable[[fx.Node], fx.Node]) -> AttentionSite:
        """Return the site with something else in the place of each node."""
        nodes: dict[str, Any] = {
            field.name: change(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), fx.Node)
        }
        return dataclasses.replace(self, **nodes, rotation=tuple(map(change, self.rotation)))


def sites_of(graph: fx.Graph) -> list[AttentionSite]:
    """Return the tagged sites of a graph, in layer order."""
    sites = [SITE.of(n) for n in graph.nodes if SITE.on(n)]
    return sorted(sites, key=lambda site: site.layer)


def forecast_dim(target: AttentionSite) -> int:
    """Return the width of one head of the projection that predicts a site's query.

    It is that of the query before its rotation, behind which a model may append channels.
    """
    shape = tensor_shape(target.rotation_input)
    return int(shape[3]) if target.rotation and len(shape) == 4 else target.head_dim
