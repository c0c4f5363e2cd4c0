"""A program whose attention runs on a fourth stream, with waits between any two streams."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import TransferRaceError
from sparda_compile.graph.effects import argument, set_argument, started_event
from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.liveness import set_keepalives, side_stream_inputs
from sparda_compile.graph.nodes import find_ops, snapshot
from sparda_compile.graph.tags import LAYER
from sparda_compile.isa.engines import DeferredEngine, ImmediateEngine, use_engine
from sparda_compile.isa.streams import ATTEND, COMPUTE, COPY
from sparda_compile.passes.check.issued import extract_program
from sparda_compile.passes.check.verify_transfers import check_program
from sparda_compile.passes.schedule.simulate import predict
from sparda_compile.program.program import Program
from sparda_compile.testing import tiny_llama

SMALL = {
    "block_size": 16, "pool_size": 8, "pool_stride": 4, "top_k": 3, "local_blocks": 1,
    "max_tokens": 512, "page_ratio": 1.0, "machine": "h200", "lowering": "eager",
}  # fmt: skip


def attend_beside(graph, *, waits_itself):
    """Put every attention on the fourth stream; compute joins it before it needs the output.

    With `waits_itself`, the attention's stream waits for the copy of its blocks, which has an
    event of its own for that.
    """
    events = itertools.count(1000)
    for attention in find_ops(graph, "sparse_attention"):
        layer = LAYER.of(attention)
        emit = Emitter(graph, attention, attention, layer)
        if waits_itself:
            copy = next(n for n in find_ops(graph, "prefetch_blocks") if LAYER.of(n) == layer)
            event = next(events)
            behind = Emitter(graph, copy.next, copy, layer)
            mark = behind.call("record_event", [copy], event, COPY, name=f"copied_{layer}")
            emit.call("wait_blocks", mark, [], [], event, ATTEND, name=f"attend_waits_{layer}")
        fork = emit.call(
            "fork_stream", side_stream_inputs([attention]), next(events), name=f"attend_{layer}"
        )
        set_argument(attention, "stream", ATTEND)
        set_argument(attention, "after", fork)
        event = next(events)
        join = Emitter(graph, attention.next, attention, layer)
        mark = join.call("record_event", [attention], event, ATTEND, name=f"attended_{layer}")
        join.call("wait_blocks", mark, [], [], event, name=f"joined_{layer}")
    set_keepalives(graph)
    graph.lint()


@pytest.fixture(scope="module")
def lab():
    model = tiny_llama(num_hidden_layers=3)
    fast = optimize(model, SpardaConfig(**SMALL, mode="forecast"))
    return Lab(fast)


class Lab:
    def __init__(self, fast):
        self.fast = fast
        self.tokens = torch.randint(2, 250, (2, 130), generator=torch.Generator().manual_seed(0))
        self.cache = fast.new_cache()
        fast(self.tokens[:, :120], past_key_values=self.cache)
        self.before = {name: t.clone() for name, t in self.cache.kv.state.items()}
        self.own = fast.programs.get("decode", 2, 512, last_only=True)

    def graph_module(self, *, waits_itself=False):
        gm = snapshot(self.own.plan.graph_module)
        attend_beside(gm.graph, waits_itself=waits_itself)
        return gm

    def program(self, gm):
        plan = dataclasses.replace(self.own.plan, graph_module=gm)
        return Program(plan, self.fast.programs.forecast)

    def run(self, program, engine):
        for name, tensor in self.cache.kv.state.items():
            tensor.copy_(self.before[name])
        logits = []
        with use_engine(engine):
            for place in range(120, 130):
                ids = self.tokens[:, place : place + 1].clone()
                positions = torch.full_like(ids, place)
                logits.append(program(ids, positions, None, self.cache.kv).clone())
        return torch.stack(logits)


@pytest.mark.parametrize("waits_itself", [False, True])
def test_verifier_proves_it(lab, waits_itself):
    program = extract_program(lab.graph_module(waits_itself=waits_itself).graph)
    assert check_program(program) > 0
    assert {step.stream for step in program} == {0, 1, 2, 3}


def cut(graph, name):
    """Take out a wait, or what it waits for."""
    for node in list(graph.nodes):
        if node.name == name:
            graph.erase_node(node)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("joined_1", "join: attended_1"),
        ("attend_waits_1", "join: copied_1"),
    ],
)
def test_verifier_misses_a_wait(lab, name, words):
    gm = lab.graph_module(waits_itself=True)
    cut(gm.graph, name)
    with pytest.raises(TransferRaceError, match=words):
        check_program(extract_program(gm.graph))


def test_verifier_misses_a_hold_and_an_order(lab):
    gm = lab.graph_module()
    joined = next(n for n in gm.graph.nodes if n.name == "joined_1")
    kept = argument(joined, "keepalive")
    assert kept
    set_argument(joined, "keepalive", [])
    with pytest.raises(TransferRaceError, match="keepalive"):
        check_program(extract_program(gm.graph))
    gm = lab.graph_module()
    attention = find_ops(gm.graph, "sparse_attention")[1]
    set_argument(attention, "after", None)
    with pytest.raises(TransferRaceError, match="sparse_attention_1"):
        check_program(extract_program(gm.graph))


def test_verifier_misses_the_wait_of_one_side_stream_for_another(lab):
    """Without compute's own wait, the attention's wait for the copy is what orders them."""
    gm = lab.graph_module(waits_itself=True)
    graph = gm.graph
    fork = next(n for n in graph.nodes if n.name == "attend_1")
    prefetch = next(n for n in find_ops(graph, "prefetch_blocks") if LAYER.of(n) == 1)
    own = next(
        n for n in find_ops(graph, "wait_blocks")
        if argument(n, "event") == started_event(prefetch)
    )  # fmt: skip
    # Compute's wait goes behind the attention: from here on it no longer orders the two.
    joined = next(n for n in graph.nodes if n.name == "joined_1")
    joined.append(own)
    assert fork
    with pytest.raises(TransferRaceError):  # the new token's page is written before the copy ends
        check_program(extract_program(graph))


@pytest.mark.parametrize("waits_itself", [False, True])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_late_streams_change_no_bit(lab, waits_itself, seed):
    want = lab.run(lab.own, ImmediateEngine())
    program = lab.program(lab.graph_module(waits_itself=waits_itself))
    assert torch.equal(lab.run(program, DeferredEngine(seed)), want)
    assert program.proof is not None
    assert program.proof.conflicts > 0


def test_a_missing_join_shows_and_is_found(lab):
    want = lab.run(lab.own, ImmediateEngine())
    gm = lab.graph_module()
    program = lab.program(gm)
    program.lowered.calls = [c for c in program.lowered.calls if not c.name.startswith("joined")]
    program.proof = object()  # do not look
    assert not torch.equal(lab.run(program, DeferredEngine()), want)
    program.proof = None
    with pytest.raises(TransferRaceError, match="joined_0"):
        lab.run(program, ImmediateEngine())


def test_simulator_runs_it_beside_compute(lab, context_of):
    gm = lab.graph_module()
    ctx = context_of(lab.own.plan)
    by_name = {row.node: row for row in predict(gm.graph, ctx)}
    for layer in range(3):
        attention, joined = by_name[f"sparse_attention_{layer}"], by_name[f"joined_{layer}"]
        assert (attention.stream, joined.stream) == (ATTEND, COMPUTE)
        assert joined.end_us == pytest.approx(attention.end_us)
        assert joined.exposed_us == pytest.approx(joined.end_us - joined.start_us)
