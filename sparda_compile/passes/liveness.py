"""Which temporaries a wait has to keep alive.

A compiler frees a tensor behind its last use in the program, and may give its memory to the next
node at once. If the copy stream still reads or writes it then, that is a race that no event
orders. So the wait that joins the copy stream takes such tensors as arguments: their last use is
then behind the copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparda_compile.passes.effects import argument, is_state, set_argument, stream_of
from sparda_compile.passes.fx import call_name, find_ops, is_sparda, program_order, tensor_shape
from sparda_compile.schedule import COPY

if TYPE_CHECKING:
    from torch import fx

__all__ = ["copy_stream_uses", "set_keepalives"]


def copy_stream_uses(node: fx.Node) -> list[fx.Node]:
    """Return the temporaries that a node of the copy stream reads or writes."""
    touched = [n for n in node.all_input_nodes if n.op != "placeholder" and not is_state(n)]
    results = [u for u in node.users if call_name(u) == "getitem"] or [node]
    # Tickets are empty: nothing is stored in them.
    return [n for n in [*touched, *results] if tensor_shape(n) != (0,)]


def set_keepalives(graph: fx.Graph) -> int:
    """Give every wait exactly the temporaries that it must keep alive; returns how many."""
    waits = find_ops(graph, "wait_blocks")
    for wait in waits:
        set_argument(wait, "keepalive", [])
    order = program_order(graph)
    joins = {argument(w, "event"): w for w in waits}
    kept: dict[fx.Node, list[fx.Node]] = {}
    pending: list[fx.Node] = []
    for node in graph.nodes:
        if not is_sparda(node) or stream_of(node) != COPY:
            continue
        pending += copy_stream_uses(node)
        if not call_name(node).endswith(("prefetch_blocks", "offload_blocks")):
            continue
        join = joins[argument(node, "event")]
        for temporary in dict.fromkeys(pending):
            last = max((order[u] for u in temporary.users), default=-1)
            if last < order[join]:
                kept.setdefault(temporary, []).append(join)
        pending = []
    by_wait: dict[fx.Node, list[fx.Node]] = {}
    for temporary, candidates in kept.items():
        by_wait.setdefault(max(candidates, key=lambda w: order[w]), []).append(temporary)
    for wait, temporaries in by_wait.items():
        set_argument(wait, "keepalive", sorted(temporaries, key=lambda n: order[n]))
    return sum(len(v) for v in by_wait.values())
