"""Small pure helpers on FX nodes and graphs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from sparda_compile.graph.tags import SITE
from sparda_compile.isa.table import op_name

if TYPE_CHECKING:
    from collections.abc import Container

__all__ = [
    "as_module",
    "call_name",
    "changed_root",
    "changes_in_place",
    "copy_graph",
    "fake_value",
    "find_ops",
    "is_sparda",
    "module_path",
    "nodes_between",
    "program_order",
    "replace_and_erase",
    "snapshot",
    "tensor_shape",
]


# What may share the memory of its first input.
_VIEWS: Final = frozenset(
    {
        "chunk",
        "contiguous",
        "detach",
        "diagonal",
        "expand",
        "expand_as",
        "flatten",
        "float",
        "getattr",
        "getitem",
        "movedim",
        "narrow",
        "permute",
        "reshape",
        "reshape_as",
        "select",
        "split",
        "squeeze",
        "swapaxes",
        "t",
        "to",
        "transpose",
        "type",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
        "view_as",
    }
)

# What returns new memory.
_NEW: Final = frozenset({"add", "baddbmm", "bmm", "matmul", "mul"})


def call_name(node: fx.Node) -> str:
    """Return what a node calls as a short word: `linear`, `view`, `sparda.select_blocks`."""
    return _target_name(node.target)


@functools.cache
def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name.replace("::", "."))
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    if isinstance(target, str):
        is_operator = target.startswith("__") and target.endswith("__")
        return target[2:-2] if is_operator else target
    return str(getattr(target, "__name__", target))


def is_sparda(node: fx.Node) -> bool:
    """Whether a node calls one of this library's ops."""
    return node.op == "call_function" and op_name(node.target) is not None


def find_ops(graph: fx.Graph, *names: str) -> list[fx.Node]:
    """Return the nodes that call `sparda.<name>`, in program order."""
    packets = [getattr(torch.ops.sparda, name) for name in names]
    targets = [target for packet in packets for target in (packet, packet.default)]
    found = [
        node
        for target in targets
        for node in graph.find_nodes(op="call_function", target=target, sort=False)
    ]
    return sorted(found)


def fake_value(node: fx.Node) -> Any:
    """Return the fake value of a node."""
    return node.meta.get("val")


def program_order(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return each node's place in the program."""
    return {node: i for i, node in enumerate(graph.nodes)}


def module_path(node: fx.Node) -> str:
    """Return the path of the module that a node came from, `model.layers.0.self_attn`."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    return str(stack[-1][0])


def nodes_between(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Return the nodes on any path from `start` (left out) to `end` (taken in)."""
    above: set[fx.Node] = {end}
    stack = [end]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source > start and source not in above:
                above.add(source)
                stack.append(source)
    between: set[fx.Node] = set()
    stack = [start]
    while stack:
        for user in stack.pop().users:
            if user in above and user not in between:
                between.add(user)
                stack.append(user)
    return between


def changes_in_place(node: fx.Node) -> bool:
    """Whether a node changes a tensor that it is given."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = call_name(node)
    return (
        name == "setitem"
        or (name.endswith("_") and not name.endswith("__"))
        or node.kwargs.get("inplace") is True
        or node.kwargs.get("out") is not None
    )


def changed_root(node: fx.Node, inside: Container[fx.Node] | None = None) -> fx.Node | None:
    """Return what made the memory that a node changes in place, back through views of it.

    Args:
        node: A node that changes what it is given.
        inside: Where to look; the first node that is not there ends the walk. None is everywhere.
    """
    root = node.kwargs.get("out", node.args[0] if node.args else None)
    while isinstance(root, fx.Node) and root.op != "placeholder":
        is_inside = inside is None or root in inside
        if not is_inside or not (call_name(root) in _VIEWS or changes_in_place(root)):
            break
        root = root.kwargs.get("out") or root.all_input_nodes[0]
    return root if isinstance(root, fx.Node) else None


def tensor_shape(node: fx.Node) -> tuple[Any, ...]:
    """Return the shape of a node's fake value, () when it is no tensor."""
    value = fake_value(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def copy_graph(source: fx.Graph) -> fx.Graph:
    """Return a copy of a graph with the same node names and metadata."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        # Arguments that are given later are not searched for sizes that are symbols: that takes
        # longer than all else.
        copy = mapping[node] = graph.create_node(node.op, node.target, name=node.name)
        copy.args = fx.node.map_arg(node.args, mapping.__getitem__)
        if node.kwargs:
            copy.kwargs = fx.node.map_arg(node.kwargs, mapping.__getitem__)
        copy.meta, copy.type = dict(node.meta), node.type
        if copy.name != node.name:
            copy.name = node.name
    for node in graph.nodes:
        if SITE.on(node):  # an attention's site, which has nodes; some may be gone
            SITE.put(node, SITE.of(node).mapped(lambda n: mapping.get(n, n)))
    return graph


def snapshot(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph module that passes may change; weights are shared."""
    copy = as_module(copy_graph(gm.graph))
    copy.meta = dict(gm.meta)
    return copy


def as_module(graph: fx.Graph) -> fx.GraphModule:
    """Return a module of a graph; its Python is written when it is first called or shown.

    Passes look at the graph alone, and its Python takes as long to write as a pass to run.
    """
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule({}, graph)


def replace_and_erase(graph: fx.Graph, old: fx.Node, new: fx.Node) -> int:
    """Put `new` in the place of `old` and erase what only `old` needed; returns how many nodes."""
    old.replace_all_uses_with(new)
    erased = 0
    unused = {old}
    while unused:
        node = max(unused)  # the last one: nothing behind it is still to be erased
        unused.remove(node)
        if (
            (not changes_in_place(node) or _changes_for_itself(node))
            and node.op != "placeholder"
            and not call_name(node).startswith("sparda.")
        ):
            sources = node.all_input_nodes
            graph.erase_node(node)
            erased += 1
            unused |= {source for source in sources if not source.users}
    for marker in find_ops(graph, "kv_update"):
        if not marker.users:
            graph.erase_node(marker)
            erased += 1
    return erased


def _changes_for_itself(node: fx.Node) -> bool:
    """Whether what a node changes in place was made for it alone, as scores are."""
    changed = node.args[0]
    return isinstance(changed, fx.Node) and call_name(changed) in _NEW and len(changed.users) < 2
