"""InsertSpeculation: attention begins with predicted blocks while the layer still selects.

Mode `speculate`, decode. Before, and after (`:` marks what runs on the attend stream):

                                                  %fork = fork_stream([%q, %pages, ..], 0)
                                                : %parts = attend_predicted(%q, %pages, ..)
                                                : %ticket = record_event([%parts], 1, 3)
    %scores = score_blocks(%q, ..)                %scores = score_blocks(%q, ..)
    %block_ids = select_blocks(%scores, ..)       %block_ids = select_blocks(%scores, ..)
    %plan = plan_pages(%block_ids, ..)            %plan = plan_pages(%block_ids, ..)
    append_kv(%k, %v, %tail_page, ..)             append_kv(%k, %v, %tail_page, ..)
    update_summary(%k, ..)                        update_summary(%k, ..)
                                                  wait_blocks(%ticket, [%pages, ..], [..], 1)
    %out = sparse_attention(%q, ..)               %out = repair_predicted(%q, .., %parts, ..)
                                                  %fork_1 = fork_stream([%scores, %level, ..], 2)
                                                : update_prediction(%scores, %level, %trend, ..)
                                                : predict_ahead(%level, %trend, .., %predicted, ..)
                                                : %ticket_1 = record_event([%predicted], 3, 3)
    ...                                           ...
                                                  wait_blocks(%ticket_1, [%level, ..], [..], 3)
    advance_lengths(%lengths)                     advance_lengths(%lengths)

It begins where the first op of the layer stood, with the query there: in front of the keys it would
cut a compiled piece in two. `append_kv` and the plan need not wait for it: they write the block of
the new token and its entry in the table, and it reads those of blocks before.

In a prompt the levels of its last tokens begin, and the prediction for the first step is made:

    begin_prediction(%q, .., %level, %trend, ..)
    predict_ahead(%level, %trend, %totals, .., %predicted, ..)

A layer in which the cost model sees no gain keeps its attention (`layer_times.py`). Blocks in CPU
memory are refused before: nothing could be attended to early.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from sparda_compile.graph.effects import argument, results_of
from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.liveness import set_keepalives
from sparda_compile.graph.nodes import find_ops
from sparda_compile.graph.tags import LAYER, SITE
from sparda_compile.hints.base import hint_points
from sparda_compile.isa.streams import ATTEND
from sparda_compile.passes.base import Fact, PassContext, PassResult
from sparda_compile.passes.rewrite.transfer_nodes import TransferNodes
from sparda_compile.passes.schedule.layer_times import speculates

if TYPE_CHECKING:
    from torch import fx

    from sparda_compile.hints.base import HintPoint, Predictor

__all__ = ["InsertSpeculation"]

# State that the attend stream reads until its partial results are there.
_PARTS_STATE: Final = ("pages", "block_table", "predicted")


@dataclasses.dataclass(frozen=True)
class InsertSpeculation:
    """Begin attention early where that pays. Counts: speculated, left."""

    name: ClassVar[str] = "insert_speculation"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FORECAST_INSERTED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.SPECULATION_INSERTED})
    preserves_numerics: ClassVar[bool] = False

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Rewrite the graph in place."""
        counts = {"speculated": 0, "left": 0}
        if ctx.strategy.predictor is None:
            return PassResult(gm, modified=False, counts=counts)
        assert ctx.layout is not None
        predictor = cast("Predictor", ctx.strategy.predictor)
        block_ids = {LAYER.of(n): n for n in find_ops(gm.graph, "select_blocks")}
        insertion: _Insertion | None = None
        for point in hint_points(gm.graph, ctx.layout, block_ids):
            insertion = insertion or _Insertion(gm.graph, ctx, point.state)
            site = point.target
            if not speculates(point.shape, site.num_heads // site.num_groups, ctx):
                counts["left"] += 1
                continue
            counts["speculated"] += 1
            if ctx.is_decode:
                insertion.add(point, predictor)
            else:
                predictor.emit_prompt(point)
        if counts["speculated"]:
            set_keepalives(gm.graph)
        return PassResult(gm, modified=counts["speculated"] > 0, counts=counts)


class _Insertion(TransferNodes):
    """Lets one layer at a time begin its attention early."""

    def add(self, point: HintPoint, predictor: Predictor) -> None:
        """Rewrite the attention of a layer."""
        out = self._attend(point)
        emit = Emitter(self.graph, out.next, out, point.target.layer)
        nodes = predictor.emit_step(point, emit)
        assert self.ctx.layout is not None
        kept = predictor.state(self.ctx.layout, point.shape)
        written = [self.state.get(name, emit.layer) for name in kept if name != "budget"]
        predicted = self.state.get("predicted", emit.layer)
        ticket, event = self.beside(nodes, [predicted], "prediction", emit)
        self.wait_at_end(ticket, event, written)

    def _attend(self, point: HintPoint) -> fx.Node:
        """Split the attention of a layer; returns what ends it."""
        layer = point.target.layer
        serial = next(n for n in find_ops(self.graph, "sparse_attention") if LAYER.of(n) == layer)
        query, pages, page_ids, block_ids, lengths, scale, softcap = serial.args
        written: dict[str, Any] = dict(serial.kwargs)
        predicted, table, counters = (
            self.state.get(name, layer) for name in ("predicted", "block_table", "counters")
        )
        first: fx.Node = argument(point.block_ids[layer], "scores")
        emit = Emitter(self.graph, first, serial, layer)
        attend = emit.call(
            "attend_predicted",
            *(query, pages, table, predicted, lengths, scale, softcap),
            stream=ATTEND,
            **written,
        )
        parts = [emit.item(attend, i) for i in range(len(results_of(attend)))]
        ticket, event = self.beside([attend], parts, "parts", emit)
        self.wait(serial, ticket, event, [self.state.get(name, layer) for name in _PARTS_STATE])
        emit = Emitter(self.graph, serial, serial, layer)
        out = emit.call(
            "repair_predicted",
            *(query, pages, page_ids, block_ids, predicted, lengths, *parts, counters),
            *(scale, softcap, self.ctx.config.repair == "union"),
            **written,
        )
        SITE.put(out, SITE.of(serial))
        serial.replace_all_uses_with(out)
        self.graph.erase_node(serial)
        return out
