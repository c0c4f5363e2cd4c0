"""What has to be the same in the programs of all ranks: collectives, and the order of all ops.

Shards may differ in size, and so may what is computed between ops; what ranks do together may not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparda_compile.graph.effects import instruction, stream_of
from sparda_compile.graph.nodes import fake_value, tensor_shape

if TYPE_CHECKING:
    from torch import fx

__all__ = ["collectives_of", "order_of"]


def collectives_of(graph: fx.Graph) -> list[str]:
    """Return each collective of a program in words: its name, shape, dtype and group, in order."""
    found = []
    for node in graph.nodes:
        it = instruction(node)
        if it is not None and it.is_collective:
            shape, dtype = list(tensor_shape(node)), fake_value(node).dtype
            found.append(f"{it.name} {shape} {dtype} of {node.args[1:]}")
    return found


def order_of(graph: fx.Graph) -> dict[str, Any]:
    """Return what ranks compare of a program: its collectives, and the schedule of its ops."""
    ops = [(node.name, stream_of(node)) for node in graph.nodes if instruction(node) is not None]
    return {"the order of collectives": collectives_of(graph), "the schedule": ops}
