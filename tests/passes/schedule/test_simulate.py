"""Predicted times of small programs written by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sparda_compile import SpardaConfig, ops
from sparda_compile.graph.effects import stream_of
from sparda_compile.graph.emit import Emitter
from sparda_compile.isa.streams import ATTEND, COMPUTE, COPY, REPAIR, SELECT
from sparda_compile.passes.base import PassContext
from sparda_compile.passes.machine import MACHINES
from sparda_compile.passes.schedule.cost import Cost
from sparda_compile.passes.schedule.simulate import Simulator, end_us

assert ops.OPS


class Program:
    """Nodes on streams, each of a time given by hand."""

    def __init__(self, machine="h200", copy_share=0.0):
        self.graph = fx.Graph()
        self.x = self.graph.placeholder("x")
        with FakeTensorMode():
            self.x.meta["val"] = torch.empty(2)
        self.emit = Emitter(self.graph, self.graph.output((self.x,)), self.x, 0)
        self.costs, self.streams = {}, {}
        machine = dataclasses.replace(MACHINES[machine], copy_share=copy_share)
        self.ctx = PassContext(SpardaConfig(), "decode", {}, "Model", None, machine)

    def work(self, name, us, stream=COMPUTE, memory=0.0):
        """Add work that uses a share of the memory's bandwidth; a copy uses the link."""
        node = self.emit.function(torch.neg, (self.x,), {}, name)
        hbm_bytes = round(memory * us * self.ctx.machine.memory_gbps * 1e3)
        link_bytes = 1 if stream in (COPY, REPAIR) else 0
        self.costs[node], self.streams[node] = Cost(us, hbm_bytes, link_bytes), stream
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
        rows = Simulator(self.costs, self.ctx).rows(nodes, self.streams)
        self.total = end_us(rows)
        assert Simulator(self.costs, self.ctx).end_us(nodes, self.streams) == self.total
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


def test_a_copy_lengthens_the_compute_beside_it_by_its_share():
    program = Program(copy_share=0.2)
    program.work("copy", 40.0, COPY)
    program.work("a", 20.0)
    program.work("b", 20.0)
    times = program.times()
    assert times["copy"][:2] == (0.0, 40.0)  # the copy itself is not held up
    assert times["a"][:2] == (0.0, 25.0)
    # 15 us beside the rest of the copy do 12 us of work, and 8 are left.
    assert times["b"][:2] == (25.0, 48.0)


@pytest.mark.parametrize("without", ["copy", "share", "overlap"])
def test_where_no_copy_runs_beside_it_nothing_changes(without):
    machine = "cpu" if without == "overlap" else "h200"
    program = Program(machine, copy_share=0.0 if without == "share" else 0.2)
    if without != "copy":
        program.work("copy", 40.0, COPY)
    program.work("ids", 5.0, SELECT)
    program.work("a", 20.0)
    times = program.times()
    assert times["a"][1] - times["a"][0] == 20.0


def test_a_copy_takes_nothing_before_it_begins_and_after_it_ends():
    program = Program(copy_share=0.5)
    program.work("a", 10.0)
    program.work("copy", 10.0, COPY)
    program.work("copy_behind", 10.0, COPY)
    program.work("b", 30.0)
    program.work("c", 10.0)
    times = program.times()
    assert times["a"][:2] == (0.0, 10.0)
    assert times["copy_behind"][:2] == (20.0, 30.0)
    assert times["b"][:2] == (10.0, 50.0)
    assert times["c"][:2] == (50.0, 60.0)


def test_a_wait_ends_with_the_copy_and_what_follows_is_free_again():
    program = Program(copy_share=0.5)
    program.work("copy", 10.0, COPY)
    program.wait(program.mark(1, COPY), 1)
    program.work("a", 5.0)
    times = program.times()
    assert times["wait1"] == (0.0, 10.0, 10.0)
    assert times["a"][:2] == (10.0, 15.0)


@pytest.mark.parametrize(
    ("side", "mine", "us"),
    [
        (0.5, 0.5, 20.0),  # together all of the bandwidth
        (0.5, 0.0, 20.0),  # it reads nothing
        (0.5, 1.0, 25.0),  # half the rate for 10 us
        (0.8, 0.4, 25.0),  # a fifth is left of the two that it uses
        (1.0, 1.0, 30.0),  # it stands still meanwhile
    ],
)
def test_streams_share_the_bandwidth_of_the_memory(side, mine, us):
    program = Program()
    program.work("scores", 10.0, SELECT, memory=side)
    program.work("a", 20.0, memory=mine)
    times = program.times()
    assert times["scores"][:2] == (0.0, 10.0)
    assert times["a"][1] == pytest.approx(us)


@pytest.mark.parametrize(("least", "us"), [(0.0, 10.0), (0.5, 20.0), (0.25, 13.333333)])
def test_scores_take_multiprocessors_whatever_their_bytes_are(least, us):
    program = Program()
    scores = program.work("scores", 100.0, SELECT)
    program.costs[scores] = dataclasses.replace(program.costs[scores], least_taken=least)
    program.work("product", 10.0, memory=1.0)
    assert program.times()["product"][1] == pytest.approx(us)


@pytest.mark.parametrize(
    ("stream", "ours", "phase", "us"),
    [
        (SELECT, True, "decode", 20.0),
        (COPY, True, "decode", 20.0),
        (ATTEND, True, "decode", 15.0),
        (SELECT, False, "decode", 15.0),
        (SELECT, True, "sparse_prefill", 15.0),  # kernels of a prompt are large
    ],
)
def test_small_kernels_of_ours_are_slower_beside_a_selection_and_a_copy(stream, ours, phase, us):
    program = Program()
    machine = dataclasses.replace(program.ctx.machine, crowd_share=0.5)
    program.ctx = dataclasses.replace(program.ctx, machine=machine, phase=phase)
    program.work("beside", 10.0, stream)
    if ours:
        node = program.mark(9, COMPUTE)
        program.costs[node] = Cost(15.0)
    else:
        node = program.work("mine", 15.0)
    assert program.times()[node.name][1] == us


def test_two_side_streams_take_from_compute_together():
    program = Program(copy_share=0.5)
    program.work("attention", 10.0, ATTEND, memory=0.25)
    program.work("copy", 10.0, COPY)
    program.work("a", 10.0, memory=1.0)
    # For 10 us three quarters of the bandwidth at half the rate.
    assert program.times()["a"][1] == pytest.approx(10.0 + 10.0 - 3.75)


@pytest.mark.parametrize(
    ("repair", "copy_ends", "repair_ends"),
    [(3.0, 23.0, 16.0), (30.0, 30.0, 50.0)],
    ids=["a short one", "a longer one"],
)
def test_copies_of_two_streams_share_the_link(repair, copy_ends, repair_ends):
    """From 10 us on each has half of its rate, as long as both are there."""
    program = Program()
    program.work("copy", 20.0, COPY)
    program.work("model", 10.0)
    program.work("repair", repair, REPAIR)
    times = program.times()
    assert times["copy"][:2] == (0.0, copy_ends)
    assert times["repair"][:2] == (10.0, repair_ends)


def test_a_copy_that_ends_later_is_awaited_for_longer():
    program = Program()
    copy = program.work("copy", 20.0, COPY)
    program.mark(1, COPY)
    program.work("model", 10.0)
    program.work("repair", 3.0, REPAIR)
    program.mark(2, REPAIR)
    program.wait(copy, 2)
    assert program.times()["wait2"] == (10.0, 16.0, 6.0)


def test_copies_one_after_the_other_share_nothing():
    program = Program()
    program.work("copy", 10.0, COPY)
    program.work("model", 10.0)
    program.work("repair", 3.0, REPAIR)
    times = program.times()
    assert (times["copy"][1], times["repair"][:2]) == (10.0, (10.0, 13.0))
