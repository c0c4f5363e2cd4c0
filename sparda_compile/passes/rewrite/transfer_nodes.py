"""What side streams do, as nodes: their start, their end and the wait for it.

`insert_prefetch.py` and `insert_speculation.py` say where they go.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from sparda_compile.graph.effects import accesses, instruction, set_argument, takes, written
from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.liveness import side_stream_inputs
from sparda_compile.graph.nodes import find_ops
from sparda_compile.graph.tags import LAYER
from sparda_compile.graph.writer import fetch_format_of
from sparda_compile.isa.streams import ATTEND, COPY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

    from sparda_compile.graph.writer import PagePlan, StateInputs
    from sparda_compile.passes.base import PassContext
    from sparda_compile.state.layout import LayerShape

__all__ = ["TransferNodes", "ops_for_later"]


def ops_for_later(graph: fx.Graph) -> list[fx.Node]:
    """Return the ops whose work only later steps use, in program order."""
    ops = ((node, instruction(node)) for node in graph.nodes)
    return [node for node, it in ops if it is not None and it.is_for_later]


class TransferNodes:
    """Adds nodes of copies; numbers their events.

    Args:
        graph: The graph to add to.
        ctx: What passes know; it has a layout.
        state: The cache's tensors.
    """

    def __init__(self, graph: fx.Graph, ctx: PassContext, state: StateInputs) -> None:
        self.graph = graph
        self.ctx = ctx
        self.state = state
        self.events: Iterator[int] = itertools.count()

    def prefetch(
        self, emit: Emitter, plan: PagePlan, prefix: str, stream: int = COPY
    ) -> tuple[fx.Node, int]:
        """Start the copy of a plan's misses on a stream; return its ticket and its event."""
        misses = (plan.miss_blocks, plan.miss_pages)
        pools = (self.state.get("host", emit.layer), self.state.get("pages", emit.layer))
        assert self.ctx.layout is not None
        stored = fetch_format_of(self.ctx.layout, emit.layer, self.state)
        keys = [each for each in stored.values() if not isinstance(each, str)]
        fork = emit.call(
            "fork_stream",
            [*misses, *pools, *keys],
            next(self.events),
            name=f"{prefix}fork_{emit.layer}",
        )
        event = next(self.events)
        ticket = emit.call(
            "prefetch_blocks",
            *misses,
            *pools,
            event,
            fork,
            name=f"{prefix}prefetch_{emit.layer}",
            stream=stream,
            **stored,
        )
        return ticket, event

    def beside(
        self, nodes: list[fx.Node], made: list[fx.Node], name: str, emit: Emitter
    ) -> tuple[fx.Node, int]:
        """Put a fork before nodes of the attend stream, and a mark where `emit` adds nodes.

        Args:
            nodes: In order; they say that they run there.
            made: What they make.
            name: What the names of fork and mark begin with.
            emit: Where the mark goes.

        Returns:
            The ticket of the mark, and its event.
        """
        fork = Emitter(self.graph, nodes[0], emit.like, emit.layer).call(
            "fork_stream",
            side_stream_inputs(nodes),
            next(self.events),
            name=f"{name}_fork_{emit.layer}",
        )
        set_argument(nodes[0], "after", fork)
        event = next(self.events)
        ticket = emit.call("record_event", made, event, ATTEND, name=f"{name}_{emit.layer}")
        return ticket, event

    def put_beside(self, for_later: list[fx.Node]) -> int:
        """Let what only later steps use run beside the model, and wait for it at the end.

        Args:
            for_later: In order; those that run on the stream that they are told go there.

        Returns:
            How many do.
        """
        of_layer: dict[int, list[fx.Node]] = {}
        for node in for_later:
            if takes(node, "stream"):
                of_layer.setdefault(LAYER.of(node), []).append(node)
        for layer, nodes in of_layer.items():
            *others, last = nodes
            for node in others:
                last.prepend(node)
            for node in nodes:
                set_argument(node, "stream", ATTEND)
            emit = Emitter(self.graph, last.next, last, layer)
            ticket, event = self.beside(nodes, written(last), "prediction", emit)
            self.wait_at_end(ticket, event, [*dict.fromkeys(s for n in nodes for s in written(n))])
        return sum(map(len, of_layer.values()))

    def wait_at_end(self, ticket: fx.Node, event: int, buffers: list[fx.Node]) -> None:
        """Wait for a side stream at the end of the step."""
        self.wait(find_ops(self.graph, "advance_lengths")[0], ticket, event, buffers)

    def used(self, plan: PagePlan) -> list[fx.Node]:
        """Return the state that choosing a plan's blocks and fetching them uses."""
        layer = LAYER.of(plan.node)
        changed = {access.state for access in accesses(plan.node) if access.is_write}
        tables = [n for n in plan.node.all_input_nodes if n.name in changed]
        return [*self.pools(layer), *tables, *self.summaries(layer)]

    def pools(self, layer: int) -> list[fx.Node]:
        """Return what a layer's blocks on the device are in."""
        assert self.ctx.layout is not None
        names = ("pages", "tail") if self.ctx.layout.has_stored_pages(layer) else ("pages",)
        return [self.state.get(name, layer) for name in names]

    def summaries(self, layer: int) -> list[fx.Node]:
        """Return the tensors of a layer's summaries."""
        assert self.ctx.layout is not None
        layout, shape = self.ctx.layout, self.shape(layer)
        return [
            self.state.get(name, layer)
            for summary in layout.summaries(layer)
            for name in layout.summary_tensors(summary, shape)
        ]

    def shape(self, layer: int) -> LayerShape:
        """Return the shape of a layer's cache."""
        assert self.ctx.layout is not None
        return next(shape for shape in self.ctx.layout.layers if shape.layer == layer)

    def wait(self, before: fx.Node, ticket: fx.Node, event: int, buffers: list[fx.Node]) -> fx.Node:
        """Wait for a copy before a node; return the wait, which takes the state as if it wrote."""
        emit = Emitter(self.graph, before, ticket, LAYER.of(ticket))
        return emit.call("wait_blocks", ticket, buffers, [], event)
