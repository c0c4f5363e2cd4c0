"""What a wait and a fork lack of their copy."""

from __future__ import annotations

import pytest

from sparda_compile.graph.effects import argument, set_argument, started_event
from sparda_compile.graph.nodes import find_ops, snapshot
from sparda_compile.graph.op_index import OpIndex
from sparda_compile.passes.check.transfers import wrong_fork, wrong_wait


@pytest.fixture
def graph(plan_of):
    later = ("schedule_transfers", "fuse_selection")
    plan = plan_of("llama", mode="forecast", machine="h200", disable_passes=later)
    return snapshot(plan.graph_module).graph


def copy_of(graph):
    copy = find_ops(graph, "prefetch_blocks")[1]
    event = started_event(copy)
    wait = next(n for n in find_ops(graph, "wait_blocks") if argument(n, "event") == event)
    return copy, wait


def test_a_wait_has_the_ticket_the_event_and_the_buffers(graph):
    copy, wait = copy_of(graph)
    index = OpIndex(graph)
    assert list(wrong_wait(index.ops[copy], index.ops[wait], ["sparda_pages_1"])) == []
    (wrong,) = wrong_wait(index.ops[copy], index.ops[wait], ["sparda_host_1"])
    assert wrong == f"{wait.name} does not take sparda_host_1 among its buffers"
    set_argument(wait, "event", 99)
    index = OpIndex(graph)
    (wrong,) = wrong_wait(index.ops[copy], index.ops[wait], [])
    assert "waits for another event" in wrong


def test_a_fork_has_what_the_work_behind_it_uses(graph):
    copy, _ = copy_of(graph)
    fork = argument(copy, "after")
    index = OpIndex(graph)
    assert list(wrong_fork(index, index.ops[copy], [copy])) == []
    set_argument(fork, "inputs", argument(fork, "inputs")[1:])
    (wrong,) = wrong_fork(OpIndex(graph), OpIndex(graph).ops[copy], [copy])
    assert wrong.startswith(f"{fork.name} does not take ")
    other = argument(find_ops(graph, "prefetch_blocks")[0], "after")
    set_argument(copy, "after", other)
    index = OpIndex(graph)
    (wrong,) = wrong_fork(index, index.ops[copy], [copy])
    assert "no fork of its layer" in wrong
