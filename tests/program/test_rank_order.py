from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from sparda_compile import SpardaConfig
from sparda_compile.errors import TransferRaceError
from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.nodes import call_name, find_ops, program_order, snapshot
from sparda_compile.graph.tags import ORDER
from sparda_compile.module.captures_of import captures_of
from sparda_compile.module.planned_ranks import as_first_rank
from sparda_compile.passes.check.issued import extract_program
from sparda_compile.passes.check.verify_transfers import check_program
from sparda_compile.program.kernel_launches import launches_of
from sparda_compile.program.lower import lower
from sparda_compile.program.plan import make_plan
from sparda_compile.program.rank_order import collectives_of, order_of
from sparda_compile.ranks.collectives import sum_in_place
from sparda_compile.testing import build

CONFIG = SpardaConfig(
    mode="forecast", block_size=16, top_k=2, local_blocks=2, max_tokens=256, machine="h200",
    offload="always", pool_size=8, pool_stride=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def plan():
    with as_first_rank(build("llama"), 2) as model:
        return make_plan(captures_of(model), "decode", CONFIG, batch_size=1, max_tokens=256)


def test_no_pass_moves_a_collective(plan):
    captured = collectives_of(plan.stage("capture").graph)
    assert len(captured) >= 5
    assert all("float32 of (2, " in text for text in captured)
    assert collectives_of(plan.graph_module.graph) == captured


def test_copies_are_in_flight_beside_collectives(plan):
    order = program_order(plan.graph_module.graph)
    sums = [order[node] for node in find_ops(plan.graph_module.graph, "all_reduce")]
    copies = find_ops(plan.graph_module.graph, "prefetch_blocks")
    spans = [(order[copy], min(order[user] for user in copy.users)) for copy in copies]
    assert any(start < place < end for start, end in spans for place in sums)


def test_a_sum_takes_its_latency_and_what_is_sent(plan):
    rows = [row for row in plan.schedule.rows if row.op == "sparda.all_reduce"]
    assert len(rows) in (4, 5)  # the embedding is sharded, or is not
    sent = 64 * 4  # 2 (n - 1) / n of a hidden state in float32
    for row in rows:
        assert row.end_us - row.start_us >= 12.0 + sent / 300e3 - 1e-9
        assert row.link_bytes == 0


def test_ranks_compare_collectives_and_schedule(plan):
    order = order_of(plan.graph_module.graph)
    assert list(order) == ["the order of collectives", "the schedule"]
    assert ("all_reduce", 0) in order["the schedule"]


def planted(plan):
    """Return the graph with one more sum beside the last one, which needs none of it."""
    gm = snapshot(plan.graph_module)
    last = find_ops(gm.graph, "all_reduce")[-1]
    emit = Emitter(gm.graph, last.next, last, -1)
    return gm, last, emit.function(last.target, last.args, {})


def test_an_order_of_collectives_is_kept_by_the_verifier(plan):
    gm, last, more = planted(plan)
    ORDER.put(more, ORDER.of(last) + 0.5)
    check_program(extract_program(gm.graph))
    last.prepend(more)
    with pytest.raises(TransferRaceError, match=rf"{last.name} .* {more.name} .* both use ranks"):
        check_program(extract_program(gm.graph))


def test_kernels_are_found_without_a_collective_being_done(plan, monkeypatch):
    # The kernels' own wrappers run; only the device that they ask for is not there.
    monkeypatch.setattr(FakeTensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(dist, "all_reduce", None)
    found = launches_of(plan.graph_module.graph, torch.device("cpu"), 1)
    assert found, "and the process group is gone"


def test_a_sum_takes_the_memory_of_its_summand(plan):
    program = lower(plan.graph_module, "eager")
    sums = [call for call in program.calls if call.name.startswith("all_reduce")]
    in_place = [call for call in sums if call.function is sum_in_place]
    # Attention and MLP of each layer end with a product; the embedding with a choice of rows.
    assert len(in_place) == 2 * len(plan.layout.layers)
    for call in in_place:
        assert call.reuses == ((call.results[0], call.args[0]),)
        assert call.args[0] in call.frees


def test_a_summand_that_is_taken_again_is_kept(plan):
    gm = snapshot(plan.graph_module)
    first = next(n for n in find_ops(gm.graph, "all_reduce") if call_name(n.args[0]) == "linear")
    last = next(n for n in reversed(gm.graph.nodes) if n.op == "output").prev
    with gm.graph.inserting_after(last):
        late = gm.graph.call_function(torch.neg, (first.args[0],))
        late.meta["val"] = first.args[0].meta["val"]
    output = next(n for n in gm.graph.nodes if n.op == "output")
    output.args = ((late,),)
    calls = {call.name: call for call in lower(gm, "eager").calls}
    assert calls[first.name].function is not sum_in_place
    assert calls[first.name].reuses == ()


def test_a_summand_that_another_result_is_a_view_of_is_kept(plan):
    gm = snapshot(plan.graph_module)
    first = next(n for n in find_ops(gm.graph, "all_reduce") if call_name(n.args[0]) == "linear")
    product = first.args[0]
    with gm.graph.inserting_after(product):
        view = gm.graph.call_method("reshape", (product, -1))
        view.meta["val"] = product.meta["val"].reshape(-1)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    output.args = ((view,),)
    calls = {call.name: call for call in lower(gm, "eager").calls}
    assert calls[first.name].function is not sum_in_place
