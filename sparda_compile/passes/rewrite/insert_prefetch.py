"""InsertPrefetch: every copy gets a start on the copy stream and a wait.

Before, and after (mode `forecast`):

    fetch_blocks(%miss_blocks, ..., %pages)     %fork = fork_stream([%miss_blocks, ..., %pages], 0)
                                                %ticket = prefetch_blocks(..., event=1, after=%fork)
                                                wait_blocks(%ticket, [%pages, %block_table, ..,
                                                    %pooled_k, ..], [keepalive], 1)
    append_kv; sparse_attention                 append_kv; sparse_attention
    store_blocks(..., %host)                    %fork = fork_stream([%tail_page, %pages, ..], 2)
    ...                                         %ticket = offload_blocks(..., event=3, after=%fork)
    advance_lengths(%lengths)                   wait_blocks(%ticket, [%host], [...], 3)
                                                advance_lengths(%lengths)

Mode `exact` also fetches what each hint names, where its ids are, and hides the repair of what
they missed behind the attention to what is there. What a hint computes becomes an op, which may run
on a side stream (`hint_pieces.py`).

    %hint_plan = plan_pages(%hint_block_ids, ...)   prefetch_blocks(...)      layer l-1
    wait_blocks(hint)  plan_pages(%block_ids)                                 layer l
    append_kv  fork_stream  prefetch_blocks(repair, on a stream of its own)
    %partial = attend_resident(%q, ...)
    fork_stream  update_prediction  record_event    (on the attend stream)
    wait_blocks(repair)
    %out = attend_missing(%q, ..., %partial)
    ...
    wait_blocks(update)  advance_lengths            the end

Where that hides less than it adds (`layer_times.py`), fetch_blocks(repair) stays in line. What only
later steps use, as the update of a prediction, nobody waits for before the step ends.

A wait takes, as if it wrote them, the pages that the copy writes and the state that choosing the
blocks has used, for that may be the select stream's work: what uses it later, such as
`update_summary`, depends on the wait, and no schedule moves it in front.

In a sparse prefill, mode `forecast` picks from the past before the layer has new keys, and fetches
what that names:

                                                %past = select_past(%forecast, [%pooled_k, ..], ..)
                                                %fork = fork_stream([%near_ids, %pages, ..], 0)
                                                %stage = stage_blocks(%near_ids, .., 1, %fork)
                                                %ticket = record_event([%staging, %slots], 1, 1)
                                                wait_blocks(%ticket, [%pages, %pooled_k, ..], [], 1)
    update_summary(%k, ..)                      update_summary(%k, ..)
    %block_ids = select_tokens(%forecast, ..)   %block_ids = select_tokens(%forecast, ..,
                                                    near_ids=%near_ids, near_scores=%near_scores)
    %stage = stage_blocks(%block_ids, ..)
    attend_tokens(.., %staging, %slots, ..)     attend_tokens(.., %staging, %slots, ..)

Mode `query` keeps its fetches in line: that is what it is, the baseline without a hint. So does a
prompt whose selection does not settle (`CacheLayout.stages_ahead`).
ScheduleTransfers moves these nodes; this pass only makes them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from sparda_compile.graph.effects import argument, results_of, set_argument
from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.liveness import set_keepalives, side_stream_inputs
from sparda_compile.graph.nodes import find_ops
from sparda_compile.graph.tags import HINT, HINTS, LAYER, SITE
from sparda_compile.graph.writer import (
    PagePlan,
    StateInputs,
    plan_pages,
    select_past,
    store_format_of,
)
from sparda_compile.isa.streams import COPY, REPAIR
from sparda_compile.passes.base import Fact, PassContext, PassResult
from sparda_compile.passes.rewrite.hint_pieces import put_in_piece
from sparda_compile.passes.rewrite.transfer_nodes import TransferNodes, ops_for_later
from sparda_compile.passes.schedule.layer_times import attends_before_repair

if TYPE_CHECKING:
    from torch import fx

__all__ = ["InsertPrefetch"]


@dataclasses.dataclass(frozen=True)
class InsertPrefetch:
    """Make copies asynchronous.

    Counts: prefetches, hint_prefetches, staged, offloads, for_later, pieces, waits.
    """

    name: ClassVar[str] = "insert_prefetch"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FORECAST_INSERTED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFERS_ASYNC})
    preserves_numerics: ClassVar[bool] = True

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Rewrite the graph in place."""
        assert ctx.layout is not None
        if not ctx.layout.offload:
            return PassResult(gm, modified=False, counts={"prefetches": 0})
        insertion = _Insertion(gm.graph, ctx, StateInputs(gm.graph, ctx.layout))
        counts = {
            "hint_prefetches": sum(insertion.hint(n) for n in _hinted(gm.graph)),
            "prefetches": sum(insertion.fetch(n) for n in find_ops(gm.graph, "fetch_blocks")),
            "staged": sum(insertion.stage(n) for n in find_ops(gm.graph, "stage_blocks")),
            "offloads": sum(insertion.store(n) for n in find_ops(gm.graph, "store_blocks")),
            "for_later": insertion.put_beside(ops_for_later(gm.graph)) if ctx.is_decode else 0,
        }
        counts["pieces"] = insertion.num_pieces
        counts["waits"] = len(find_ops(gm.graph, "wait_blocks"))
        set_keepalives(gm.graph)
        return PassResult(gm, modified=True, counts=counts)


def _hinted(graph: fx.Graph) -> list[tuple[fx.Node, str, int]]:
    return [(node, *guess) for node in graph.nodes for guess in HINTS.get(node, ())]


class _Insertion(TransferNodes):
    """Makes one copy asynchronous at a time."""

    def __init__(self, graph: fx.Graph, ctx: PassContext, state: StateInputs) -> None:
        super().__init__(graph, ctx, state)
        self.num_pieces = 0
        self._first_waits: dict[int, fx.Node] = {}

    def hint(self, hinted: tuple[fx.Node, str, int]) -> int:
        """Fetch what a hint names, and wait before the layer's own plan."""
        layout, hints = self.ctx.layout, self.ctx.strategy.hints
        assert layout is not None
        ids, name, layer = hinted
        plan = _plan_of(self.graph, layer)
        emit = Emitter(self.graph, ids.next, ids, layer)
        prefix = "hint_" if len(hints) == 1 else f"{name}_"
        self.num_pieces += put_in_piece(self.graph, name, layer, prefix)
        guess = plan_pages(emit, ids, self.state, layout, prefix, is_hint=True)
        ticket, event = self.prefetch(emit, guess, prefix)
        hint = next(hint for hint in hints if hint.name == name)
        state = hint.state(layout, self.shape(layer))
        kept = [self.state.get(tensor, layer) for tensor in state]
        # The last copy is awaited first: only then is nothing left on the select stream.
        before = self._first_waits.get(layer, plan)
        wait = self.wait(before, ticket, event, [*self.used(guess), *kept])
        self._first_waits[layer] = wait
        for node in (guess.node, *guess.node.users, ticket, wait):
            HINT.put(node, name)
        return 1

    def fetch(self, fetch: fx.Node) -> int:
        """Split an in-line fetch into its start and its wait."""
        if not self.ctx.strategy.overlaps:
            return 0
        layer = LAYER.of(fetch)
        plan = _plan_items(fetch.args[0].args[0])  # type: ignore[union-attr,arg-type]
        attention = next(
            n for n in find_ops(self.graph, "sparse_attention") if LAYER.of(n) == layer
        )
        if self.ctx.strategy.repairs:
            if not attends_before_repair(self.shape(layer), self.ctx):
                return 0  # in line, behind the copies of its hints
            emit = Emitter(self.graph, attention, fetch, layer)
            ticket, event = self.prefetch(emit, plan, "", REPAIR)
            self._split_attention(emit, attention, plan, ticket, event)
        else:
            emit = Emitter(self.graph, fetch, fetch, layer)
            ticket, event = self.prefetch(emit, plan, "")
            self.wait(fetch, ticket, event, self.used(plan))
        self.graph.erase_node(fetch)
        return 1

    def stage(self, stage: fx.Node) -> int:
        """Fetch what tokens of a prompt read of the past before the layer has new keys."""
        assert self.ctx.layout is not None
        if not self.ctx.layout.stages_ahead:
            return 0
        layer, picked = LAYER.of(stage), argument(stage, "block_ids")
        updates = find_ops(self.graph, "update_summary")
        update = next(n for n in updates if LAYER.of(n) == layer)
        emit = Emitter(self.graph, update, stage, layer)
        near_ids, near_scores = select_past(emit, picked)
        set_argument(picked, "near_ids", near_ids)
        set_argument(picked, "near_scores", near_scores)
        set_argument(stage, "block_ids", near_ids)
        inputs = side_stream_inputs([stage])
        fork = emit.call("fork_stream", inputs, next(self.events), name=f"fork_{layer}")
        set_argument(stage, "stream", COPY)
        set_argument(stage, "after", fork)
        staged = list(stage.users)
        for node in (stage, *staged):
            update.prepend(node)
        event = next(self.events)
        ticket = emit.call("record_event", staged, event, COPY, name=f"staged_{layer}")
        pools = [*self.pools(layer), self.state.get("block_table", layer)]
        self.wait(update, ticket, event, [*pools, *self.summaries(layer)])
        return 1

    def store(self, store: fx.Node) -> int:
        """Split an in-line store into its start and a wait at the end of the step."""
        assert self.ctx.layout is not None
        layer = LAYER.of(store)
        emit = Emitter(self.graph, store, store, layer)
        event = next(self.events)
        inputs = side_stream_inputs([store])
        fork = emit.call("fork_stream", inputs, event, name=f"offload_fork_{layer}")
        event = next(self.events)
        stored = store_format_of(self.ctx.layout, layer, self.state)
        ticket = emit.call("offload_blocks", *store.args, event, fork, **stored)
        used = self.pools(layer) if self.ctx.layout.kv_format(layer).rounds else []
        self.wait_at_end(ticket, event, [*used, self.state.get("host", layer)])
        self.graph.erase_node(store)
        return 1

    def _split_attention(
        self, emit: Emitter, attention: fx.Node, plan: PagePlan, ticket: fx.Node, event: int
    ) -> None:
        query, pages, page_ids, block_ids, lengths, scale, softcap = attention.args
        selection = (query, pages, page_ids, block_ids, plan.is_miss, lengths)
        pages_as: dict[str, Any] = dict(attention.kwargs)
        partial = emit.call("attend_resident", *selection, scale, softcap, **pages_as)
        parts = [emit.item(partial, i) for i in range(len(results_of(partial)))]
        for node in ops_for_later(self.graph):
            if LAYER.of(node) == emit.layer:
                attention.prepend(node)  # nobody waits for it, and it runs while the copy does
        self.wait(attention, ticket, event, [self.state.get("pages", emit.layer)])
        out = emit.call("attend_missing", *selection, *parts, scale, softcap, **pages_as)
        SITE.put(out, SITE.of(attention))
        attention.replace_all_uses_with(out)
        self.graph.erase_node(attention)


def _plan_of(graph: fx.Graph, layer: int) -> fx.Node:
    plans = find_ops(graph, "plan_pages")
    return next(p for p in plans if LAYER.of(p) == layer and not argument(p, "is_hint"))


def _plan_items(plan: fx.Node) -> PagePlan:
    names = results_of(plan)
    return PagePlan(plan, **{names[int(str(user.args[1]))]: user for user in plan.users})
