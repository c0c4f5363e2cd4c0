"""The start of a copy and the wait for it, as nodes; `insert_prefetch.py` says where they go."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from sparda_compile.graph.effects import accesses
from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.tags import LAYER
from sparda_compile.graph.writer import fetch_format_of
from sparda_compile.isa.streams import COPY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

    from sparda_compile.graph.writer import PagePlan, StateInputs
    from sparda_compile.passes.base import PassContext
    from sparda_compile.state.layout import LayerShape

__all__ = ["TransferNodes"]


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
        written = fetch_format_of(self.ctx.layout, emit.layer, self.state)
        keys = [each for each in written.values() if not isinstance(each, str)]
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
            **written,
        )
        return ticket, event

    def used(self, plan: PagePlan) -> list[fx.Node]:
        """Return the state that choosing a plan's blocks and fetching them uses."""
        layer = LAYER.of(plan.node)
        written = {access.state for access in accesses(plan.node) if access.is_write}
        tables = [n for n in plan.node.all_input_nodes if n.name in written]
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
