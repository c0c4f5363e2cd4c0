"""What flows where in a model's graph: data from the input tokens, and positions.

Sizes do not count as flow: a tensor made from another one's shape does not depend on it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import networkx as nx
import torch
from torch import Tensor, fx

from sparda_compile.graph.nodes import call_name, fake_value, nodes_between, tensor_shape

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["LINEAR", "MATMUL", "Dataflow", "RefusedAttentionError"]

MATMUL: Final = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
LINEAR: Final = frozenset({"linear", "addmm"})
_OUR_NAMESPACES: Final = frozenset({"aten", "prims", "sparda"})
_SUMS: Final = frozenset({"add", "add_", "iadd", "radd", "sub", "sub_", "isub"})


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
        hidden = self._input_of_linears(hidden, q)
        while len(tensor_shape(hidden)) != 3 and call_name(hidden) in (
            "view",
            "reshape",
            "flatten",
        ):
            hidden = self._activation_input(hidden)
        self._check_full_rank(hidden, q, k, v)
        if len(tensor_shape(hidden)) != 3:
            raise RefusedAttentionError(
                f"its input has shape {tensor_shape(hidden)}, not [B, T, hidden]"
            )
        return hidden, min(n for n in nodes_between(hidden, q) if self._is_linear(n))

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

    def _input_of_linears(self, node: fx.Node, q: fx.Node) -> fx.Node:
        """Return the nearest node, from `node` upwards, that linears make the query of."""
        for candidate in self._dominator_chain(node):
            between = nodes_between(candidate, q)
            if any(map(self._is_linear, between)):
                # Behind a residual stream it is the input of a layer before.
                if candidate is node or self._depths(candidate, q, least=0)[q]:
                    return candidate
                break
            if any(call_name(n) in MATMUL for n in between):
                break
        raise RefusedAttentionError("its query is not made by a linear projection")

    def _is_linear(self, node: fx.Node) -> bool:
        """Whether a node multiplies an activation by a weight.

        An op from outside of torch that takes both is taken for one: so are quantised weights.
        """
        name = call_name(node)
        if name in LINEAR:
            return True
        if name not in MATMUL and not _is_foreign(node):
            return False
        tensors = [n for n in node.all_input_nodes if tensor_shape(n)]
        return len([n for n in tensors if n in self.active]) == 1 and len(tensors) > 1

    def _check_full_rank(self, hidden: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node) -> None:
        """Refuse queries or keys that come from `hidden` only through one linear behind another.

        An adapter of low rank is no bottleneck: what it makes is added to what one linear makes of
        the same input. Keys may carry a channel made of the value, as NOSA's retention score; that
        is none either.
        """
        to_value = self._depths(hidden, v)
        values = {n for n, depth in to_value.items() if depth} if to_value[v] == 1 else set()
        if self._depths(hidden, q)[q] > 1 or self._depths(hidden, k, values)[k] > 1:
            raise RefusedAttentionError(
                "keys or queries pass through a low-rank bottleneck, as in multi-head latent "
                "attention (MLA)"
            )

    def _depths(
        self, hidden: fx.Node, end: fx.Node, free: Collection[fx.Node] = (), *, least: int = 1
    ) -> dict[fx.Node, int]:
        """Return how many linears, one behind another, make each node up to `end` of `hidden`.

        One that takes as many channels as `hidden` has counts only where it is the first: nothing
        is lost before it. Of what is added up, the least counts; of what is put together in another
        way, the most.

        Args:
            hidden: The input.
            end: A node behind it.
            free: Nodes behind which no linear counts.
            least: What is added up counts from so many linears on, if any of it has as many.
        """
        depths, passed = {hidden: 0}, set(free)
        for node in sorted(nodes_between(hidden, end)):
            given = [source for source in node.all_input_nodes if source in depths]
            found = [depths[source] for source in given]
            depth = max(found)
            if call_name(node) in _SUMS:
                depth = min((d for d in found if d >= least), default=depth)
            if any(source in passed for source in given):
                passed.add(node)
            elif self._is_linear(node):
                is_narrow = any(_width(source) < _width(hidden) for source in given)
                depth = depth + 1 if is_narrow else max(depth, 1)
            depths[node] = depth
        depths.setdefault(end, 0)
        return depths

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


def _width(node: fx.Node) -> int:
    """Return how many numbers a node has; of two nodes the tokens are the same."""
    return math.prod(int(size) for size in tensor_shape(node))


def _is_foreign(node: fx.Node) -> bool:
    """Whether a node calls an op that is neither torch's nor ours."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if not isinstance(target, torch._ops.OpOverloadPacket):
        return False
    return target._qualified_op_name.split("::")[0] not in _OUR_NAMESPACES


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
