"""FuseSelection: picking blocks and planning their pages become one op, on a GPU one launch.

Before, and after:

    %block_ids = select_blocks(%scores, ...)      %select_pages = select_pages(%scores, ...)
    %plan = plan_pages(%block_ids, ...)           %picked_ids = getitem(%select_pages, 0)
    %page_ids = getitem(%plan, 0)                 %page_ids = getitem(%select_pages, 1)
    ...                                           ...

The fused op stands where the plan stood. A selection that something reads before its plan is left
alone. So is one whose plan waits for a copy, as after a hint: blocks are picked while that copy
runs. And so is one with two plans, such as ids that another layer takes as its hint: one of the
plans may go to the select stream, and the other may not.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from sparda_compile.graph.effects import argument, results_of, written
from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.liveness import set_keepalives
from sparda_compile.graph.nodes import call_name, find_ops, program_order
from sparda_compile.graph.tags import HINT, LAYER
from sparda_compile.passes.base import Fact, PassContext, PassResult

if TYPE_CHECKING:
    from torch import fx

__all__ = ["FuseSelection"]


@dataclasses.dataclass(frozen=True)
class FuseSelection:
    """Fuse every selection with its plan. Counts: fused, left."""

    name: ClassVar[str] = "fuse_selection"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FORECAST_INSERTED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.SELECTION_FUSED})
    preserves_numerics: ClassVar[bool] = True

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Rewrite the graph in place."""
        del ctx
        plans = find_ops(gm.graph, "plan_pages")
        order = program_order(gm.graph)
        fused = sum(_fuse(gm.graph, plan, order) for plan in plans)
        if fused:
            set_keepalives(gm.graph)
        counts = {"fused": fused, "left": len(plans) - fused}
        return PassResult(gm, modified=fused > 0, counts=counts)


def _waits_for(graph: fx.Graph, plan: fx.Node) -> list[fx.Node]:
    """Return the waits behind which a plan's tables are free to use."""
    tables = set(written(plan))
    waits = find_ops(graph, "wait_blocks")
    return [wait for wait in waits if tables & set(argument(wait, "buffers"))]


def _fuse(graph: fx.Graph, plan: fx.Node, order: dict[fx.Node, int]) -> bool:
    ids = argument(plan, "block_ids")
    if call_name(ids) != "sparda.select_blocks":
        return False
    others = [user for user in ids.users if user is not plan]
    if any(order[n] < order[plan] or call_name(n) == "sparda.plan_pages" for n in others):
        return False
    if any(order[ids] < order[wait] < order[plan] for wait in _waits_for(graph, plan)):
        return False
    lengths, tables = argument(plan, "lengths"), written(plan)
    emit = Emitter(graph, plan, plan, LAYER.of(plan))
    sizes = [argument(ids, n) for n in ("num_selected", "block_size", "sink_blocks")]
    fused = emit.call(
        "select_pages",
        argument(ids, "scores"),
        lengths,
        *tables,
        *sizes,
        argument(ids, "local_blocks"),
        argument(plan, "eviction"),
        argument(plan, "is_hint"),
        name=plan.name.replace("plan", "select_pages"),
    )
    fused_results, results = results_of(fused), results_of(plan)
    if HINT.on(plan):
        HINT.put(fused, HINT.of(plan))
    place = fused_results.index("block_ids")
    picked = emit.item(fused, place, ids.name.replace("block_ids", "picked_ids"))
    ids.replace_all_uses_with(picked, delete_user_cb=lambda user: user is not plan)
    picked.meta |= {k: v for k, v in ids.meta.items() if k not in picked.meta}
    for result in sorted(plan.users, key=lambda n: order[n]):
        result.update_arg(0, fused)
        result.update_arg(1, fused_results.index(results[int(str(result.args[1]))]))
    graph.erase_node(plan)
    graph.erase_node(ids)
    return True
