"""Which temporaries a wait has to keep alive.

A program lets go of a tensor behind its last use, and the memory may go to the next node at once.
If a side stream still reads or writes it then, that is a race that no event orders. So the wait
that joins the side streams takes such tensors as arguments: their last use is then behind the copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparda_compile.graph.effects import (
    awaited_event,
    instruction,
    is_state,
    set_argument,
    started_event,
    stream_of,
)
from sparda_compile.graph.nodes import call_name, fake_value, is_sparda, program_order, tensor_shape
from sparda_compile.isa.streams import BEHIND, COMPUTE
from sparda_compile.isa.table import Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

__all__ = ["set_keepalives", "side_stream_inputs", "side_stream_uses"]


def side_stream_uses(node: fx.Node) -> list[fx.Node]:
    """Return the temporaries that a node of a side stream reads or writes; a wait uses none.

    What returns nothing has no result to keep.
    """
    it = instruction(node)
    if it is not None and it.work is Work.NONE:
        return []
    touched = [n for n in node.all_input_nodes if n.op != "placeholder" and not is_state(n)]
    results = [u for u in node.users if call_name(u) == "getitem"] or [node]
    # Tickets are empty: nothing is stored in them.
    found = [n for n in [*touched, *results] if fake_value(n) is not None]
    return [n for n in found if tensor_shape(n) != (0,)]


def side_stream_inputs(work: Sequence[fx.Node]) -> list[fx.Node]:
    """Return what a fork must take for the work that follows it on side streams.

    Temporaries and state alike: the fork then depends on all that the work must come behind.
    """
    inside = set(work)
    sources = [n for node in work for n in node.all_input_nodes if n not in inside]
    made_inside = {u for node in work for u in node.users if call_name(u) == "getitem"}
    wanted = dict.fromkeys(n for n in sources if n not in made_inside)
    return [n for n in wanted if not _is_fork(n) and _is_used(n)]


def _is_fork(node: fx.Node) -> bool:
    it = instruction(node)
    return it is not None and it.forks


def _is_used(node: fx.Node) -> bool:
    """Weights never change, so nothing has to come before their use."""
    return node.op != "placeholder" or is_state(node)


def set_keepalives(graph: fx.Graph) -> int:
    """Give every wait exactly the temporaries that it must keep alive; returns how many.

    Each goes to the wait for the copy that its use leads to: a selection to that of the blocks it
    chose. An earlier wait for a later copy, which joins that one too, keeps nothing for it.
    """
    waits = [n for n in graph.nodes if awaited_event(n) is not None]
    for wait in waits:
        set_argument(wait, "keepalive", [])
    order = program_order(graph)
    # What compute goes on behind is free then; a wait of a side stream frees nothing.
    waits_by_event = {awaited_event(w): w for w in waits if stream_of(w) == COMPUTE}
    joins: dict[fx.Node, fx.Node] = {}
    next_joins: dict[int, fx.Node] = {}
    for node in reversed(graph.nodes):
        if not is_sparda(node) or stream_of(node) == COMPUTE:
            continue
        stream = stream_of(node)
        if (started := waits_by_event.get(started_event(node))) is not None:
            # It joins, too, what its stream is behind: a copy the selection of its blocks.
            next_joins |= dict.fromkeys((stream, *BEHIND[stream]), started)
        for temporary in side_stream_uses(node):
            join = next_joins.get(stream)
            assert join is not None, f"{node.name} is on a side stream and no wait joins it"
            joins[temporary] = max(join, joins.get(temporary, join), key=lambda w: order[w])
    kept: dict[fx.Node, list[fx.Node]] = {}
    for temporary, join in joins.items():
        if max((order[u] for u in temporary.users), default=-1) < order[join]:
            kept.setdefault(join, []).append(temporary)
    for wait, temporaries in kept.items():
        set_argument(wait, "keepalive", sorted(temporaries, key=lambda n: order[n]))
    return sum(len(v) for v in kept.values())
