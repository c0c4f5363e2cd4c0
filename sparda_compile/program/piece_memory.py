"""Bytes that a piece takes while it runs: results and what it computes on its way.

eager      every node that is no view makes a tensor, which lives until its last use
inductor   what is no matrix product and the like is computed where it is used, so tensors are
           what such products take and return, and results. One that is computed by Inductor
           itself takes the memory of an input of its size that ends there
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, fx

from sparda_compile.graph.fake_runner import leaves_of, share_memory
from sparda_compile.graph.nodes import call_name, fake_value
from sparda_compile.sizes import concrete

if TYPE_CHECKING:
    from sparda_compile.program.pieces import Piece

__all__ = ["num_bytes", "piece_bytes"]

# What is called, not fused; in place or not.
_CALLED: Final = frozenset(
    {
        "_grouped_mm",
        "addmm",
        "argsort",
        "baddbmm",
        "bmm",
        "conv1d",
        "cumsum",
        "einsum",
        "grouped_mm",
        "index_add",
        "linear",
        "matmul",
        "mm",
        "scaled_dot_product_attention",
        "scatter",
        "scatter_add",
        "sort",
        "topk",
    }
)


def num_bytes(value: Any, batch: int, tokens: int) -> int:
    """Return the bytes of a fake tensor with numbers put in for the open sizes."""
    if not isinstance(value, Tensor):
        return 0
    return math.prod(concrete(value.shape, batch, tokens)) * value.dtype.itemsize


@dataclasses.dataclass
class _Buffer:
    """A tensor that a piece makes, and the place of its last use."""

    size: int
    last: int


def piece_bytes(piece: Piece, lowering: str, batch: int, tokens: int) -> int:
    """Return the most bytes that a piece holds at once beside its inputs.

    Args:
        piece: The piece.
        lowering: `inductor` or `eager`.
        batch: Sequences.
        tokens: Columns that it is given.
    """
    nodes = list(piece.graph_module.graph.nodes)
    made: dict[fx.Node, _Buffer] = {}
    # What a node's value is read from: tensors of this piece, itself if it is one.
    sources: dict[fx.Node, set[fx.Node]] = {}
    for i, node in enumerate(nodes):
        above = set[fx.Node]().union(*(sources[n] for n in node.all_input_nodes))
        for source in above:
            made[source].last = i
        if node.op != "placeholder" and _is_tensor(node, lowering):
            made[node] = _Buffer(num_bytes(fake_value(node), batch, tokens), i)
            above = {node}
        sources[node] = above
    return _peak(nodes, made, sources, reuses=lowering == "inductor")


def _peak(
    nodes: list[fx.Node],
    made: dict[fx.Node, _Buffer],
    sources: dict[fx.Node, set[fx.Node]],
    *,
    reuses: bool,
) -> int:
    ends: dict[int, int] = {}
    live = peak = 0
    for i, node in enumerate(nodes):
        if node in made:
            size = made[node].size
            given = set[fx.Node]().union(*(sources[n] for n in node.all_input_nodes))
            dying = [s for s in given if made[s].last == i and made[s].size == size]
            in_place = reuses and not _is_called(node) and bool(dying)
            peak = max(peak, live + (0 if in_place else size))
            live += size
            ends[made[node].last] = ends.get(made[node].last, 0) + size
        live -= ends.pop(i, 0)
    return peak


def _is_tensor(node: fx.Node, lowering: str) -> bool:
    """Whether a node's value is a tensor of its own when the piece runs."""
    if not isinstance(fake_value(node), Tensor) or node.op == "output" or _is_view(node):
        return False
    return lowering == "eager" or _is_called(node) or any(map(_is_called, _users(node)))


def _users(node: fx.Node) -> list[fx.Node]:
    """Return what takes a value or a view of it."""
    return [
        found for user in node.users for found in (user, *(_users(user) if _is_view(user) else ()))
    ]


def _is_view(node: fx.Node) -> bool:
    value = fake_value(node)
    given = leaves_of([fake_value(source) for source in node.all_input_nodes])
    return isinstance(value, Tensor) and any(
        isinstance(other, Tensor) and share_memory(value, other) for other in given
    )


def _is_called(node: fx.Node) -> bool:
    """Whether a node needs its inputs as tensors: it calls a library, or returns them."""
    return node.op == "output" or call_name(node).rstrip("_") in _CALLED
