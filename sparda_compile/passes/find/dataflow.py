"""What flows where in a model's graph: data from the input tokens, and positions.

Sizes do not count as flow: a tensor made from another one's shape does not depend on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import networkx as nx
import torch
from torch import Tensor, fx

from sparda_compile.graph.nodes import call_name, fake_value, nodes_between, tensor_shape

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["LINEAR", "MATMUL", "Dataflow", "RefusedAttentionError"]

MATMUL: Final = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
LINEAR: Final = frozenset({"linear", "addmm"})


class RefusedAttentionError(Exception):
    """This attention is not implemented; the text says why."""


class Dataflow:
    """What flows where: data from the input tokens, and positions."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.active = _tainted(graph, "input_ids")
        self._positional = _tainted(graph, "position_ids") - self.active
        self._dominators: dict[Any, Any] | None = None

    def hidden(self, q: fx.Node, k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Return the tensor that feeds q, k and v, and the linear that makes q."""
        for node, what in ((q, "query"), (k, "key"), (v, "value")):
            if node not in self.active:
                raise RefusedAttentionError(f"its {what} does not depend on the input tokens")
        chains = [self._dominator_chain(n) for n in (q, k, v)]
        common = set(chains[1]) & set(chains[2])
        hidden = next((n for n in chains[0] if n in common), None)
        if hidden is None:
            raise RefusedAttentionError("query, key and value have no common source")
        chain = self._dominator_chain(hidden)
        if not _linears(nodes_between(hidden, q)):
            fused = next((n for n in [hidden, *chain] if call_name(n) in LINEAR), None)
            between = nodes_between(fused, q) if fused else set()
            if fused is None or any(call_name(n) in MATMUL for n in between):
                raise RefusedAttentionError("its query is not made by a linear projection")
            hidden = self._activation_input(fused)
        while len(tensor_shape(hidden)) != 3 and call_name(hidden) in (
            "view",
            "reshape",
            "flatten",
        ):
            hidden = self._activation_input(hidden)
        linears = _linears(nodes_between(hidden, q))
        if not linears:
            raise RefusedAttentionError("its query is not made by a linear projection")
        if len(linears) > 1 or len(_key_projections(hidden, k, v)) > 1:
            raise RefusedAttentionError(
                "keys or queries pass through a low-rank bottleneck, as in multi-head latent "
                "attention (MLA)"
            )
        if len(tensor_shape(hidden)) != 3:
            raise RefusedAttentionError(
                f"its input has shape {tensor_shape(hidden)}, not [B, T, hidden]"
            )
        return hidden, linears[0]

    def rotation(self, hidden: fx.Node, query: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        """Return where positions begin to mix into the query, and the nodes from there on."""
        region = nodes_between(hidden, query)
        mixing = {
            n
            for n in region
            if any(i in self._positional and _is_float(i) for i in n.all_input_nodes)
        }
        if not mixing:
            return query, ()
        for candidate in self._dominator_chain(query)[1:]:
            inside = nodes_between(candidate, query)
            if mixing <= inside:
                order = {n: i for i, n in enumerate(self.graph.nodes)}
                return candidate, tuple(sorted(inside, key=lambda n: order[n]))
        raise RefusedAttentionError("the rotation of its query has no single beginning")

    def _activation_input(self, node: fx.Node) -> fx.Node:
        return next(n for n in node.all_input_nodes if n in self.active)

    def _dominator_chain(self, node: fx.Node) -> list[fx.Node]:
        """Return `node`, its immediate dominator, that one's, ... up to the input."""
        if self._dominators is None:
            digraph = nx.DiGraph()
            for user in self.graph.nodes:
                if user in self.active:
                    inputs = [n for n in user.all_input_nodes if n in self.active]
                    digraph.add_edges_from((n, user) for n in inputs or ["root"])
            self._dominators = nx.immediate_dominators(digraph, "root")
        chain = [node]
        while (above := self._dominators.get(chain[-1])) not in ("root", None, chain[-1]):
            chain.append(above)
        return chain


def _linears(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if call_name(n) in LINEAR]


def _key_projections(hidden: fx.Node, k: fx.Node, v: fx.Node) -> list[fx.Node]:
    """Return the linears that make the key, but those that it takes from the token's value.

    Keys may carry a channel made of the value, as NOSA's retention score; that is no bottleneck.
    """
    to_key = _linears(nodes_between(hidden, k))
    to_value = _linears(nodes_between(hidden, v))
    if len(to_value) != 1:
        return to_key
    of_value = {to_value[0], *nodes_between(to_value[0], k)}
    return [n for n in to_key if n not in of_value]


def _is_float(node: fx.Node) -> bool:
    value = fake_value(node)
    return isinstance(value, Tensor) and value.is_floating_point()


def _tainted(graph: fx.Graph, source: str) -> set[fx.Node]:
    """Return the tensors that are computed from a graph input; shapes do not count."""
    tainted: set[fx.Node] = set()
    for node in graph.nodes:
        starts = node.op == "placeholder" and source in node.name
        if starts or any(n in tainted for n in node.all_input_nodes):
            value = fake_value(node)
            # A size is a tuple too, but of numbers.
            if isinstance(value, (Tensor, tuple, list)) and not isinstance(value, torch.Size):
                tainted.add(node)
    return tainted
