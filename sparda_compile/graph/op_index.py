"""The sparda ops of a graph, looked up once: by name, by layer, with their arguments by name."""

from __future__ import annotations

import dataclasses
import operator
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from sparda_compile.graph.effects import instruction
from sparda_compile.graph.tags import LAYER, SITE

if TYPE_CHECKING:
    from torch import fx

    from sparda_compile.isa.table import Instruction

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
            if SITE.on(node):
                self.sites[SITE.of(node).layer].append(node)
            if (it := instruction(node)) is not None:
                self._add(node, place, it)

    def _add(self, node: fx.Node, place: int, it: Instruction) -> None:
        args = {name: default for name, _, default in it.arguments}
        args.update(zip(it.places, node.args, strict=False))
        args.update(node.kwargs)
        layer = LAYER.get(node)
        op = Op(node, it.name, layer, place, args, it.tensors)
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
