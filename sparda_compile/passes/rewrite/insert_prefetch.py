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
they missed behind the attention to what is there:

    %hint_plan = plan_pages(%hint_block_ids, ...)   prefetch_blocks(...)      layer l-1
    wait_blocks(hint)  plan_pages(%block_ids)                                 layer l
    append_kv  fork_stream  prefetch_blocks(repair)
    %partial = attend_resident(%q, ...)
    ...                                         what only later steps use: an update of the hint
    wait_blocks(repair)
    %out = attend_missing(%q, ..., %partial)

A wait takes, as if it wrote them, the pages that the copy writes and the state that choosing the
blocks has used, for that may be the select stream's work: what uses it later, such as
`update_summary`, depends on the wait, and no schedule moves it in front.

Mode `query` keeps its fetches in line: that is what it is, the baseline without a hint.
ScheduleTransfers moves these nodes; this pass only makes them.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, ClassVar

from sparda_compile.graph.effects import accesses, argument, instruction, results_of
from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.liveness import set_keepalives, side_stream_inputs
from sparda_compile.graph.nodes import find_ops
from sparda_compile.graph.tags import HINT, HINTS, LAYER, SITE
from sparda_compile.graph.writer import PagePlan, StateInputs, plan_pages
from sparda_compile.passes.base import Fact, PassContext, PassResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

__all__ = ["InsertPrefetch"]


@dataclasses.dataclass(frozen=True)
class InsertPrefetch:
    """Make copies asynchronous. Counts: prefetches, hint_prefetches, offloads, waits."""

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
            "offloads": sum(insertion.store(n) for n in find_ops(gm.graph, "store_blocks")),
        }
        counts["waits"] = len(find_ops(gm.graph, "wait_blocks"))
        set_keepalives(gm.graph)
        return PassResult(gm, modified=True, counts=counts)


def _hinted(graph: fx.Graph) -> list[tuple[fx.Node, str, int]]:
    return [(node, *guess) for node in graph.nodes for guess in HINTS.get(node, ())]


class _Insertion:
    """Makes one copy asynchronous at a time; numbers events."""

    def __init__(self, graph: fx.Graph, ctx: PassContext, state: StateInputs) -> None:
        self._graph = graph
        self._ctx = ctx
        self._state = state
        self._events: Iterator[int] = itertools.count()
        self._first_waits: dict[int, fx.Node] = {}

    def hint(self, hinted: tuple[fx.Node, str, int]) -> int:
        """Fetch what a hint names, and wait before the layer's own plan."""
        layout, hints = self._ctx.layout, self._ctx.strategy.hints
        assert layout is not None
        ids, name, layer = hinted
        plan = _plan_of(self._graph, layer)
        emit = Emitter(self._graph, ids.next, ids, layer)
        prefix = "hint_" if len(hints) == 1 else f"{name}_"
        guess = plan_pages(emit, ids, self._state, layout, prefix, is_hint=True)
        ticket, event = self._prefetch(emit, guess, prefix)
        shape = next(shape for shape in layout.layers if shape.layer == layer)
        state = next(hint for hint in hints if hint.name == name).state(layout, shape)
        kept = [self._state.get(tensor, layer) for tensor in state]
        # The last copy is awaited first: only then is nothing left on the select stream.
        before = self._first_waits.get(layer, plan)
        wait = self._wait(before, ticket, event, [*self._used(guess), *kept])
        self._first_waits[layer] = wait
        for node in (guess.node, *guess.node.users, ticket, wait):
            HINT.put(node, name)
        return 1

    def fetch(self, fetch: fx.Node) -> int:
        """Split an in-line fetch into its start and its wait."""
        if not self._ctx.strategy.overlaps:
            return 0
        layer = LAYER.of(fetch)
        plan = _plan_items(fetch.args[0].args[0])  # type: ignore[union-attr,arg-type]
        attention = next(
            n for n in find_ops(self._graph, "sparse_attention") if LAYER.of(n) == layer
        )
        if self._ctx.strategy.repairs:
            emit = Emitter(self._graph, attention, fetch, layer)
            ticket, event = self._prefetch(emit, plan, "")
            self._split_attention(emit, attention, plan, ticket, event)
        else:
            emit = Emitter(self._graph, fetch, fetch, layer)
            ticket, event = self._prefetch(emit, plan, "")
            self._wait(fetch, ticket, event, self._used(plan))
        self._graph.erase_node(fetch)
        return 1

    def store(self, store: fx.Node) -> int:
        """Split an in-line store into its start and a wait at the end of the step."""
        layer = LAYER.of(store)
        emit = Emitter(self._graph, store, store, layer)
        event = next(self._events)
        inputs = side_stream_inputs([store])
        fork = emit.call("fork_stream", inputs, event, name=f"offload_fork_{layer}")
        event = next(self._events)
        ticket = emit.call("offload_blocks", *store.args, event, fork)
        end = find_ops(self._graph, "advance_lengths")[0]
        self._wait(end, ticket, event, [self._state.get("host", layer)])
        self._graph.erase_node(store)
        return 1

    def _prefetch(self, emit: Emitter, plan: PagePlan, prefix: str) -> tuple[fx.Node, int]:
        misses = (plan.miss_blocks, plan.miss_pages)
        pools = (self._state.get("host", emit.layer), self._state.get("pages", emit.layer))
        fork = emit.call(
            "fork_stream",
            [*misses, *pools],
            next(self._events),
            name=f"{prefix}fork_{emit.layer}",
        )
        event = next(self._events)
        ticket = emit.call(
            "prefetch_blocks", *misses, *pools, event, fork, name=f"{prefix}prefetch_{emit.layer}"
        )
        return ticket, event

    def _used(self, plan: PagePlan) -> list[fx.Node]:
        """Return the state that choosing a plan's blocks and fetching them uses."""
        assert self._ctx.layout is not None
        layout, layer = self._ctx.layout, LAYER.of(plan.node)
        shape = next(shape for shape in layout.layers if shape.layer == layer)
        summaries = [
            self._state.get(name, layer)
            for summary in layout.summaries()
            for name in layout.summary_tensors(summary, shape)
        ]
        written = {access.state for access in accesses(plan.node) if access.is_write}
        tables = [n for n in plan.node.all_input_nodes if n.name in written]
        return [self._state.get("pages", layer), *tables, *summaries]

    def _wait(
        self, before: fx.Node, ticket: fx.Node, event: int, buffers: list[fx.Node]
    ) -> fx.Node:
        emit = Emitter(self._graph, before, ticket, LAYER.of(ticket))
        return emit.call("wait_blocks", ticket, buffers, [], event)

    def _for_later(self, layer: int) -> list[fx.Node]:
        """Return the ops of a layer whose work only later steps use."""
        ops = ((n, instruction(n)) for n in self._graph.nodes if LAYER.get(n) == layer)
        return [n for n, it in ops if it is not None and it.is_for_later]

    def _split_attention(
        self, emit: Emitter, attention: fx.Node, plan: PagePlan, ticket: fx.Node, event: int
    ) -> None:
        query, pages, page_ids, block_ids, lengths, scale, softcap = attention.args
        selection = (query, pages, page_ids, block_ids, plan.is_miss, lengths)
        partial = emit.call("attend_resident", *selection, scale, softcap)
        parts = [emit.item(partial, i) for i in range(len(results_of(partial)))]
        for node in self._for_later(emit.layer):
            attention.prepend(node)  # nobody waits for it, and it runs while the copy does
        self._wait(attention, ticket, event, [self._state.get("pages", emit.layer)])
        out = emit.call("attend_missing", *selection, *parts, scale, softcap)
        SITE.put(out, SITE.of(attention))
        attention.replace_all_uses_with(out)
        self._graph.erase_node(attention)


def _plan_of(graph: fx.Graph, layer: int) -> fx.Node:
    plans = find_ops(graph, "plan_pages")
    return next(p for p in plans if LAYER.of(p) == layer and not argument(p, "is_hint"))


def _plan_items(plan: fx.Node) -> PagePlan:
    names = results_of(plan)
    return PagePlan(plan, **{names[int(str(user.args[1]))]: user for user in plan.users})
