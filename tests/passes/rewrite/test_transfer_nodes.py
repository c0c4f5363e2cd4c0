"""The start of a copy and its wait: what they take, and which events they have."""

from __future__ import annotations

from sparda_compile.graph.effects import argument
from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.nodes import call_name, find_ops, snapshot
from sparda_compile.graph.writer import StateInputs, plan_pages
from sparda_compile.passes.rewrite.transfer_nodes import TransferNodes


def test_a_copy_takes_the_misses_of_its_plan_and_the_wait_what_choosing_used(plan_of, context_of):
    plan = plan_of("llama", machine="h200", mode="query", disable_passes=("fuse_selection",))
    context = context_of(plan)
    graph = snapshot(plan.graph_module).graph
    nodes = TransferNodes(graph, context, StateInputs(graph, context.layout))
    ids = find_ops(graph, "select_blocks")[1]
    emit = Emitter(graph, ids.next, ids, 1)
    guess = plan_pages(emit, ids, nodes.state, context.layout, "my_", is_hint=True)
    ticket, event = nodes.prefetch(emit, guess, "my_")
    fork = argument(ticket, "after")
    assert (ticket.name, fork.name) == ("my_prefetch_1", "my_fork_1")
    assert argument(ticket, "miss_blocks") is guess.miss_blocks
    assert argument(ticket, "pages").name == "sparda_pages_1"
    assert argument(ticket, "event") == event != argument(fork, "event")
    used = {node.name.removeprefix("sparda_").removesuffix("_1") for node in nodes.used(guess)}
    tables = {"block_table", "page_block", "page_stamp", "counters"}
    assert used == {"pages", "pooled_k", "recent_k", *tables}
    wait = nodes.wait(find_ops(graph, "append_kv")[1], ticket, event, nodes.used(guess))
    assert call_name(wait) == "sparda.wait_blocks"
    assert (argument(wait, "ticket"), argument(wait, "event")) == (ticket, event)
    _, second = nodes.prefetch(emit, guess, "other_")
    assert second > event
