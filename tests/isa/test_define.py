"""An op from outside the package: what it says of itself is all that anybody needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparda_compile import ops
from sparda_compile.errors import GraphInvariantError, PassError, TransferRaceError
from sparda_compile.graph.dependences import dependence_graph, mark_order
from sparda_compile.graph.effects import accesses, argument, stream_of
from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.nodes import find_ops, snapshot
from sparda_compile.graph.tags import FACTS
from sparda_compile.graph.writer import StateInputs
from sparda_compile.isa.define import define, implementation
from sparda_compile.isa.engines import DeferredEngine, current_engine, use_engine
from sparda_compile.isa.streams import COPY
from sparda_compile.isa.table import INSTRUCTIONS, Work, instruction_of
from sparda_compile.passes.check.spec import check_spec
from sparda_compile.passes.check.verify_transfers import VerifyTransfers
from sparda_compile.passes.schedule.cost import node_cost
from sparda_compile.passes.schedule.schedule_transfers import ScheduleTransfers
from sparda_compile.profiling.kernel_trace import own_kernels, planned_nodes

assert ops.OPS


@pytest.fixture(scope="module")
def touch_pages():
    """An op that adds to a layer's pages, behind the layer's own new token."""

    @define(
        mutates=("pages",),
        fake=lambda a: a.pages.new_empty(a.num_results),
        work=Work.TOUCHED,
        kernels=("_touch",),
        behind=("append_kv",),
        latency_us=40.0,
        is_free=True,
    )
    def touch_pages(
        pages: Tensor, num_results: int, stream: int = 0, after: Tensor | None = None
    ) -> Tensor:
        """Add one to all pages."""
        result = pages.new_empty(num_results)

        def work() -> None:
            pages.add_(1)
            result.fill_(1)

        current_engine().submit(stream, work)
        return result

    yield touch_pages
    del INSTRUCTIONS["touch_pages"]
    instruction_of.cache_clear()


class Touched:
    """A decode graph in which layer 1 has one more op, behind a node."""

    def __init__(self, plan_of, context_of, behind, layer=1, **options):
        later = ("schedule_transfers",)
        plan = plan_of("llama", mode="forecast", machine="h200", disable_passes=later)
        self.gm, self.ctx = snapshot(plan.graph_module), context_of(plan)
        self.facts = FACTS.of(plan.graph_module)
        graph = self.gm.graph
        state = StateInputs(graph, plan.layout.traced())
        place = find_ops(graph, behind)[1]
        emit = Emitter(graph, place.next, place, 1)
        self.node = emit.call("touch_pages", state.get("pages", layer), 3, **options)

    def check(self):
        check_spec(self.gm.graph, self.facts, self.ctx, "a pass")


def test_its_function_is_the_op(touch_pages):
    pages = torch.zeros(2)
    assert touch_pages(pages, 4).tolist() == [1.0] * 4
    assert torch.ops.sparda.touch_pages(pages, 1).tolist() == [1.0]
    assert pages.tolist() == [2.0, 2.0]
    assert implementation(torch.ops.sparda.touch_pages.default)(pages, 1).tolist() == [1.0]
    torch.library.opcheck(touch_pages, (torch.zeros(2), 3))
    with use_engine(DeferredEngine()) as engine:
        touch_pages(pages, 1, stream=COPY)
        assert engine.num_pending == 1


def test_a_name_is_given_once(touch_pages):
    del touch_pages
    with pytest.raises(PassError, match="sparda::recall_ids is defined already"):

        @define()
        def recall_ids(ids: Tensor) -> None:
            """Have another's name."""


def test_what_is_written_has_no_default():
    with pytest.raises(PassError, match="sparda::fill writes ids, which has a default"):

        @define(mutates=("pages", "ids"))
        def fill(pages: Tensor, ids: Tensor | None = None) -> None:
            """Write what may be left out."""


def test_effects_cost_and_kernels_are_its_own(touch_pages, plan_of, context_of):
    del touch_pages
    touched = Touched(plan_of, context_of, "append_kv")
    node, ctx = touched.node, touched.ctx
    assert [(a.state, a.is_write) for a in accesses(node)] == [("sparda_pages_1", True)]
    assert stream_of(node) == 0
    assert argument(node, "num_results") == 3
    cost = node_cost(node, ctx)
    assert cost.us > 40.0
    assert cost.hbm_bytes > 0
    assert "_touch" in own_kernels()
    mark_order(touched.gm.graph)
    planned = {each.node: each.kernels for each in planned_nodes(touched.gm.graph, 1)}
    assert planned[node.name] == ("_touch",)


def test_scheduler_and_verifier_keep_it_where_it_belongs(touch_pages, plan_of, context_of):
    del touch_pages
    touched = Touched(plan_of, context_of, "append_kv")
    graph = touched.gm.graph
    mark_order(graph)
    dag = dependence_graph(graph)
    attention = next(n for n in find_ops(graph, "sparse_attention") if n > touched.node)
    assert dag.has_edge(touched.node, attention)
    ScheduleTransfers()(touched.gm, touched.ctx)
    VerifyTransfers()(touched.gm, touched.ctx)
    order = list(graph.nodes)
    assert order.index(touched.node) < order.index(attention)


def test_a_race_with_it_is_found(touch_pages, plan_of, context_of):
    """On a side stream, with nothing that orders it, it writes what attention reads."""
    del touch_pages
    touched = Touched(plan_of, context_of, "append_kv", stream=COPY)
    with pytest.raises(TransferRaceError, match="touch_pages"):
        VerifyTransfers()(touched.gm, touched.ctx)


@pytest.mark.parametrize(
    ("behind", "layer", "words"),
    [
        ("score_blocks", 1, "touch_pages_1"),  # before append_kv
        ("append_kv", 0, "touch_pages_1 takes sparda_pages_0 as its pages, not sparda_pages_1"),
    ],
)
def test_the_grammar_knows_its_order_and_its_layer(
    touch_pages, plan_of, context_of, behind, layer, words
):
    del touch_pages
    Touched(plan_of, context_of, "append_kv").check()
    with pytest.raises(GraphInvariantError, match=words):
        Touched(plan_of, context_of, behind, layer).check()
