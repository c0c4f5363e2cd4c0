"""The sparda ops of a graph, looked up once: by name, by layer, with their arguments by name."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import fx

__all__ = ["Op", "OpIndex", "result_of"]


@dataclasses.dataclass(slots=True, eq=False)  # there are hundreds: frozen ones take twice as long
class Op:
    """One node that calls `sparda.<name>`.

    Attributes:
        node: The node.
        name: Name of the op, without `sparda.`.
        layer: Layer that it is for, None if the node does not say.
        place: Place in the program.
        args: Every argument of the schema by name, defaults too.
        tensors: Names of those that are tensors or lists of tensors.
    """

    node: fx.Node
    name: str
    layer: int | None
    place: int
    args: dict[str, Any]
    tensors: tuple[str, ...]


class OpIndex:
    """The sparda ops of a graph, in program order.

    Attributes:
        graph: The graph.
        ops: All of them, by node.
        sites: Nodes that carry an AttentionSite, by the layer that it names.
        by_name: Ops by their name.
        by_layer: Ops by their layer.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.ops: dict[fx.Node, Op] = {}
        self.sites: defaultdict[int, list[fx.Node]] = defaultdict(list)
        self.by_name: defaultdict[str, list[Op]] = defaultdict(list)
        self.by_layer: defaultdict[int | None, list[Op]] = defaultdict(list)
        for place, node in enumerate(graph.nodes):
            if "sparda" in node.meta:
                self.sites[node.meta["sparda"].layer].append(node)
            if node.op == "call_function" and (signature := _signature(node.target)) is not None:
                self._add(node, place, signature)

    def _add(self, node: fx.Node, place: int, signature: _Signature) -> None:
        args = signature.defaults.copy()
        args.update(zip(signature.names, node.args, strict=False))
        args.update(node.kwargs)
        layer = node.meta.get("sparda_layer")
        op = Op(node, signature.op, layer, place, args, signature.tensors)
        self.ops[node] = op
        self.by_name[op.name].append(op)
        self.by_layer[op.layer].append(op)

    def maker(self, value: Any) -> Op | None:
        """Return the op that makes a value, or a tuple that the value is one result of."""
        made = result_of(value)
        return self.ops.get(made[0] if made else value)


def result_of(value: Any) -> tuple[fx.Node, int] | None:
    """Return the node that a value is one result of, and which one."""
    is_choice = getattr(value, "target", None) is operator.getitem
    return (value.args[0], value.args[1]) if is_choice else None


class _Signature(NamedTuple):
    """A schema: the op's name, and its arguments' names and defaults."""

    op: str
    names: tuple[str, ...]
    defaults: dict[str, Any]
    tensors: tuple[str, ...]


@functools.cache
def _signature(target: Any) -> _Signature | None:
    """Return the schema of what a node calls, None if that is no op of this library."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = target.default if target._qualified_op_name.startswith("sparda::") else None
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "sparda":
        return None
    schema = target._schema
    return _Signature(
        op=schema.name.split("::")[1],
        names=tuple(entry.name for entry in schema.arguments),
        defaults={entry.name: entry.default_value for entry in schema.arguments},
        tensors=tuple(e.name for e in schema.arguments if "Tensor" in str(e.type)),
    )
