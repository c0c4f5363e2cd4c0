"""Predicted times of small programs written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sparda_compile import SpardaConfig, ops
from sparda_compile.graph.effects import stream_of
from sparda_compile.graph.emit import Emitter
from sparda_compile.isa.streams import ATTEND, COMPUTE, COPY, SELECT
from sparda_compile.passes.base import PassContext
from sparda_compile.passes.machine import MACHINES
from sparda_compile.passes.schedule.cost import Cost
from sparda_compile.passes.schedule.simulate import end_us, simulate

assert ops.OPS


class Program:
    """Nodes on streams, each of a time given by hand."""

    def __init__(self, machine="h200"):
        self.graph = fx.Graph()
        self.x = self.graph.placeholder("x")
        with FakeTensorMode():
            self.x.meta["val"] = torch.empty(2)
        self.emit = Emitter(self.graph, self.graph.output((self.x,)), self.x, 0)
        self.costs, self.streams = {}, {}
        self.ctx = PassContext(SpardaConfig(), "decode", {}, "Model", None, MACHINES[machine])

    def work(self, name, us, stream=COMPUTE):
        node = self.emit.function(torch.neg, (self.x,), {}, name)
        self.costs[node], self.streams[node] = Cost(us), stream
        return node

    def mark(self, event, stream):
        node = self.emit.call("record_event", [self.x], event, stream, name=f"mark{event}")
        self.costs[node], self.streams[node] = Cost(0.0), stream_of(node)
        return node

    def wait(self, ticket, event, stream=COMPUTE):
        node = self.emit.call("wait_blocks", ticket, [], [], event, stream, name=f"wait{event}")
        self.costs[node], self.streams[node] = Cost(0.0), stream_of(node)

    def times(self):
        nodes = [n for n in self.graph.nodes if n.op not in ("placeholder", "output")]
        rows = simulate(nodes, self.costs, self.ctx, self.streams)
        self.total = end_us(rows)
        return {row.node: (row.start_us, row.end_us, row.exposed_us) for row in rows}


def test_streams_run_beside_each_other_and_a_wait_exposes_the_rest():
    program = Program()
    program.work("a", 10.0)
    program.work("copy", 30.0, COPY)
    ticket = program.mark(1, COPY)
    program.work("b", 5.0)
    program.wait(ticket, 1)
    times = program.times()
    assert times["copy"][:2] == (10.0, 40.0)
    assert times["b"][:2] == (10.0, 15.0)
    assert times["wait1"] == (15.0, 40.0, 25.0)
    assert program.total == 40.0


@pytest.mark.parametrize(("stream", "start"), [(SELECT, 10.0), (COPY, 17.0), (ATTEND, 10.0)])
def test_a_side_stream_starts_behind_what_its_table_says(stream, start):
    program = Program()
    program.work("a", 10.0)
    program.work("ids", 7.0, SELECT)
    if stream == SELECT:
        return  # its own
    program.work("b", 1.0, stream)
    assert program.times()["b"][0] == start


def test_one_side_stream_waits_for_another():
    program = Program()
    program.work("copy", 30.0, COPY)
    ticket = program.mark(1, COPY)
    program.wait(ticket, 1, ATTEND)
    program.work("attention", 5.0, ATTEND)
    joined = program.mark(2, ATTEND)
    program.work("b", 2.0)
    program.wait(joined, 2)
    times = program.times()
    assert times["attention"][:2] == (30.0, 35.0)
    assert times["wait2"] == (2.0, 35.0, 33.0)


def test_without_overlap_all_streams_are_one():
    program = Program("cpu")
    program.work("a", 10.0)
    program.work("copy", 30.0, COPY)
    program.wait(program.mark(1, COPY), 1)
    times = program.times()
    assert times["copy"][:2] == (10.0, 40.0)
    assert times["wait1"][2] == 0.0
    assert end_us([]) == 0.0
