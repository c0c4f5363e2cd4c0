"""Where the kernels of a model begin, as a compiler would fuse its nodes.

    %gate = linear(..)    %up = linear(..)       two kernels: a matrix multiplication is one
    %s = silu(%gate)                             begins a third
    %m = mul(%s, %up)                            is fused with it
    %down = linear(%m)                           a fourth
    %h = add(%before, %down)                     begins a fifth; what follows is fused with it

A node is fused with what it uses unless a kernel lies between. The depth of a node is the most
kernels on a way to it; an elementwise node that is deeper than all elementwise ones that it uses
begins a kernel. Those that use the same kernel's result at first hand begin one together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sparda_compile.graph.effects import instruction
from sparda_compile.graph.nodes import call_name
from sparda_compile.isa.table import Work

if TYPE_CHECKING:
    from torch import fx

__all__ = ["KERNELS", "VIEWS", "begin_kernels"]

VIEWS: Final = frozenset(
    {
        "getitem",
        "view",
        "reshape",
        "transpose",
        "permute",
        "expand",
        "unsqueeze",
        "squeeze",
        "contiguous",
        "to",
        "float",
        "size",
        "split",
        "chunk",
        "flatten",
        "unflatten",
        "detach",
    }
)
# No compiler fuses these with what is elementwise.
KERNELS: Final = frozenset(
    {
        "linear",
        "addmm",
        "matmul",
        "bmm",
        "baddbmm",
        "einsum",
        "embedding",
        "softmax",
        "topk",
        "scaled_dot_product_attention",
        "grouped_mm",
        "_grouped_mm",
        "sort",
        "index_add_",
    }
)


def begin_kernels(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of the model that begin a kernel; ops of ours are none of them."""
    depth: dict[fx.Node, int] = {}
    elementwise: set[fx.Node] = set()  # and views of them
    begun: set[fx.Node] = set()  # kernels whose result an elementwise node uses
    found = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        deepest = max((depth[n] for n in inputs), default=0)
        if node.op not in ("call_function", "call_method"):
            depth[node] = 0
            continue
        it, name = instruction(node), call_name(node)
        if it is None and name in VIEWS:
            depth[node] = deepest
            if inputs and inputs[0] in elementwise:
                elementwise.add(node)
            continue
        if it is not None or name in KERNELS:
            depth[node] = deepest + (it is None or it.work is not Work.NONE)
            if it is None:
                found.add(node)
            continue
        depth[node] = deepest
        elementwise.add(node)
        if deepest > max((depth[n] for n in inputs if n in elementwise), default=0):
            sources = {_source(n) for n in inputs if n not in elementwise and depth[n] == deepest}
            if not sources & begun:
                found.add(node)
            begun |= sources
    return found


def _source(node: fx.Node) -> fx.Node:
    """Return what a node is a view of, through any number of views."""
    while node.op in ("call_function", "call_method") and call_name(node) in VIEWS:
        if not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
    return node
