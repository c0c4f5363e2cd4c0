"""VerifyTransfers, by mutation: break a right program in every single way, and it must object."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from sparda_compile.errors import TransferRaceError
from sparda_compile.graph.effects import accesses, argument, conflicts, set_argument
from sparda_compile.graph.liveness import set_keepalives
from sparda_compile.graph.nodes import find_ops, is_sparda, snapshot
from sparda_compile.isa.streams import ATTEND, COMPUTE, COPY, SELECT, STREAM_NAMES
from sparda_compile.passes.base import Fact
from sparda_compile.passes.check.issued import extract_program
from sparda_compile.passes.check.verify_transfers import VerifyTransfers, check_program
from sparda_compile.testing import TINY_MODELS

MODES = {
    "dense": {"mode": "dense", "offload": "always"},
    "forecast": {"mode": "forecast"},
    "query": {"mode": "query"},
    "exact-forecast": {"mode": "exact", "hint": "forecast"},
    "exact-previous_step": {"mode": "exact", "hint": "previous_step"},
    "exact-previous_layer": {"mode": "exact", "hint": "previous_layer"},
}
# Programs that predict a step from the one before.
PREDICTING = {
    "exact-ema": {"mode": "exact", "hint": "ema"},
    "exact-ema+next_query": {"mode": "exact", "hint": ("ema", "next_query")},
    "speculate": {"mode": "speculate", "offload": "never", "speculate_where": "always"},
}
UNSCHEDULED = ("schedule_transfers",)

# What is begun and has to be awaited, besides copies to CPU memory, which may outlive a step.
STARTS = ("prefetch", "hint_prefetch", "staged", "parts", "prediction")

# Llama on every machine and unscheduled too; every other family in every mode on the one where the
# schedule does most.
OTHERS = sorted(set(TINY_MODELS) - {"llama"})


def arranged(program, order):
    """Return the instructions numbered in `order`, with what refers to them renumbered."""
    new = {old: i for i, old in enumerate(order)}
    moved = {i for i in range(len(program)) if new.get(i) != i}

    def renumbered(numbers):
        return tuple(new[i] for i in numbers if i in new)

    def rewritten(it):
        lists = (*it.inputs, *it.keepalive, *it.touches, *it.selected_by)
        if moved.isdisjoint((*lists, it.forked_by, it.chosen_from)):
            return it
        return dataclasses.replace(
            it,
            inputs=renumbered(it.inputs),
            keepalive=renumbered(it.keepalive),
            touches=renumbered(it.touches),
            forked_by=new.get(it.forked_by),
            selected_by=renumbered(it.selected_by),
            chosen_from=new.get(it.chosen_from),
        )

    return [rewritten(program[old]) for old in order]


def without(program, number):
    return arranged(program, [i for i in range(len(program)) if i != number])


def swapped(program, first, second):
    order = list(range(len(program)))
    order[first], order[second] = second, first
    return arranged(program, order)


def changed(program, number, **fields):
    result = list(program)
    result[number] = dataclasses.replace(program[number], **fields)
    return result


def dropped(numbers, number):
    return tuple(i for i in numbers if i != number)


def _is_needed(program, fork):
    """Whether compute has done anything since the fork before, of the same side stream."""
    (stream,) = {it.stream for it in program if it.forked_by == fork}
    forks = {it.forked_by for it in program if it.stream == stream} - {None}
    before = max((other for other in forks if other < fork), default=None)
    between = [] if before is None else program[before + 1 : fork]
    return before is None or any(it.stream == COMPUTE and not it.forks for it in between)


def omissions(program):
    """Yield every program that lacks one wait, fork, event or keepalive that it needs."""
    for i, it in enumerate(program):
        if it.waits is not None or (it.forks and _is_needed(program, i)):
            yield f"{it.name} removed", without(program, i)
        if it.forked_by is not None:
            yield f"{it.name} does not wait for its fork", changed(program, i, forked_by=None)
        if it.selected_by:
            yield f"{it.name} does not follow its selection", changed(program, i, selected_by=())
        if it.records is not None:
            yield f"{it.name} records nothing", changed(program, i, records=None)
        for kept in it.keepalive:
            lists = {"keepalive": dropped(it.keepalive, kept), "inputs": dropped(it.inputs, kept)}
            yield f"{it.name} keeps {program[kept].name} no more", changed(program, i, **lists)


def unawaited(program):
    """Yield every program in which the start of a prefetch has lost both event and wait."""
    for i, it in enumerate(program):
        if it.records is not None and it.name.startswith(STARTS):
            wait = next(n for n, other in enumerate(program) if other.waits == it.records)
            yield f"{it.name} is not awaited", without(changed(program, i, records=None), wait)


def swaps(program):
    """Yield every program in which two conflicting ops, or a maker and its user, trade places."""
    stateful = [i for i, it in enumerate(program) if accesses(it.node)]
    pairs = {p for p in itertools.combinations(stateful, 2) if conflicts(*_nodes(program, p))}
    for i, it in enumerate(program):
        if is_sparda(it.node):
            pairs |= {(source, i) for source in it.inputs}
    for first, second in sorted(pairs):
        name = f"{program[first].name} and {program[second].name} swapped"
        yield name, swapped(program, first, second)


def detours(program):
    """Yield every program in which one op of the compute stream runs on a side stream."""
    for i, it in enumerate(program):
        works = is_sparda(it.node) and not it.forks and it.waits is None
        if works and it.stream == COMPUTE:
            for stream in (COPY, SELECT, ATTEND):
                name = f"{it.name} on the {STREAM_NAMES[stream]} stream"
                yield name, changed(program, i, stream=stream)


def _nodes(program, numbers):
    return [program[i].node for i in numbers]


def survivors(program, *kinds):
    found = []
    for name, mutant in itertools.chain.from_iterable(kind(program) for kind in kinds):
        try:
            check_program(mutant)
        except TransferRaceError:
            continue
        found.append(name)
    return found


def check_all(plan):
    program = extract_program(plan.graph_module.graph)
    assert check_program(program) == plan.stages[-1].counts["conflicts"] > 0
    assert survivors(program, omissions, unawaited, swaps, detours) == []
    return program


@pytest.mark.parametrize("disable_passes", [(), UNSCHEDULED], ids=["scheduled", "unscheduled"])
@pytest.mark.parametrize("machine", ["cpu", "h200"])
@pytest.mark.parametrize("mode", MODES)
def test_no_mutation_of_a_decode_survives(plan_of, mode, machine, disable_passes):
    plan = plan_of("llama", machine=machine, disable_passes=disable_passes, **MODES[mode])
    program = check_all(plan)
    num_omissions = len(list(omissions(program)))
    # The copies of `dense` are in line: there is no wait to leave out, only an order to break.
    assert num_omissions == 0 if mode == "dense" else num_omissions >= 10
    assert len(list(swaps(program))) >= 20


@pytest.mark.parametrize("disable_passes", [(), UNSCHEDULED], ids=["scheduled", "unscheduled"])
@pytest.mark.parametrize("mode", PREDICTING)
def test_no_mutation_of_a_prediction_survives(plan_of, mode, disable_passes):
    plan = plan_of("llama", machine="h200", disable_passes=disable_passes, **PREDICTING[mode])
    program = check_all(plan)
    side = {it.name for it in program if it.stream == ATTEND}
    ahead = {"attend_predicted", "update_prediction", "predict_ahead"}
    assert {name.rstrip("_0123456789") for name in side} >= (
        ahead if mode == "speculate" else set()
    )
    assert len(list(omissions(program))) >= 10
    assert len(list(unawaited(program))) >= (4 if mode == "speculate" else 2)


@pytest.mark.parametrize("phase", ["prefill", "sparse_prefill"])
@pytest.mark.parametrize("mode", ["exact-ema", "speculate"])
def test_no_mutation_of_a_prompt_that_begins_levels_survives(plan_of, mode, phase):
    check_all(plan_of("llama", phase, machine="h200", **PREDICTING[mode]))


@pytest.mark.parametrize("model", ["gemma3", "phi3"])
@pytest.mark.parametrize("mode", ["exact-ema", "speculate"])
def test_no_mutation_of_a_prediction_survives_in_other_models(plan_of, model, mode):
    check_all(plan_of(model, machine="h200", **PREDICTING[mode]))


@pytest.mark.parametrize("model", OTHERS)
@pytest.mark.parametrize("mode", MODES)
def test_no_mutation_of_a_decode_survives_in_any_model(plan_of, model, mode):
    check_all(plan_of(model, machine="h200", **MODES[mode]))


@pytest.mark.parametrize("model", OTHERS)
@pytest.mark.parametrize("mode", ["dense", "forecast"])
def test_no_mutation_of_a_prefill_survives_in_any_model(plan_of, model, mode):
    check_all(plan_of(model, "prefill", machine="h200", **MODES[mode]))


@pytest.mark.parametrize("disable_passes", [(), UNSCHEDULED], ids=["scheduled", "unscheduled"])
@pytest.mark.parametrize("machine", ["cpu", "h200"])
@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_no_mutation_of_a_sparse_prefill_survives(plan_of, model, machine, disable_passes):
    plan = plan_of(model, "sparse_prefill", machine=machine, disable_passes=disable_passes)
    program = check_all(plan)
    layers = 2 if model == "llama" else 1
    # Of each layer two copies with fork, event and wait, and what they keep alive.
    assert len(list(omissions(program))) >= 6 * layers
    names = {it.name for it in program if it.stream == COPY}
    assert {"stage_1", "staged_1", "offload_blocks_1"} <= names


@pytest.mark.parametrize("disable_passes", [(), UNSCHEDULED], ids=["scheduled", "unscheduled"])
@pytest.mark.parametrize("machine", ["cpu", "h200"])
@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_no_mutation_of_a_prefill_survives(plan_of, model, machine, disable_passes):
    check_all(plan_of(model, "prefill", machine=machine, disable_passes=disable_passes))


CHAINS = {
    (): ("scores_1", "select_pages_1"),
    ("fuse_selection",): ("scores_1", "block_ids_1", "plan_1"),
}


@pytest.mark.parametrize(
    ("disable_passes", "cut"), [(disabled, cut) for disabled in CHAINS for cut in CHAINS[disabled]]
)
def test_no_mutation_survives_wherever_the_chain_is_cut(plan_of, disable_passes, cut):
    # The cost model prefers one cut; the others are right as well.
    plan = plan_of("llama", machine="h200", disable_passes=disable_passes)
    gm = snapshot(plan.graph_module)
    by_name = {n.name: n for n in gm.graph.nodes}
    stages = CHAINS[disable_passes]
    fork = argument(by_name["scores_1"], "after")
    assert fork is not None
    for name in stages:
        is_beside = stages.index(name) >= stages.index(cut)
        set_argument(by_name[name], "stream", SELECT if is_beside else COMPUTE)
        set_argument(by_name[name], "after", None)
    by_name[cut].prepend(fork)
    set_argument(fork, "inputs", [by_name[cut].args[0]])
    set_argument(by_name[cut], "after", fork)
    set_keepalives(gm.graph)
    program = extract_program(gm.graph)
    check_program(program)
    assert survivors(program, omissions, unawaited, swaps, detours) == []


def test_copies_in_line_need_no_order_between_streams(plan_of):
    disabled = ("insert_prefetch", "schedule_transfers")
    program = check_all(plan_of("llama", disable_passes=disabled))
    assert {it.stream for it in program} == {COMPUTE}


class TestGraph:
    """The same, on the graph itself: what a pass could do wrong."""

    @pytest.fixture
    def graph_of(self, plan_of):
        plan = plan_of("llama", machine="h200", mode="exact", hint="forecast")
        return lambda: snapshot(plan.graph_module)

    def races(self, gm):
        with pytest.raises(TransferRaceError) as caught:
            VerifyTransfers()(gm, None)
        return str(caught.value)

    def test_right_graph_passes_and_is_left_alone(self, graph_of):
        gm = graph_of()
        before = [n.name for n in gm.graph.nodes]
        result = VerifyTransfers()(gm, None)
        assert not result.modified
        assert set(result.counts) == {"instructions", "conflicts", "events"}
        assert [n.name for n in gm.graph.nodes] == before
        assert VerifyTransfers.ensures == {Fact.TRANSFERS_VERIFIED}

    def test_wait_erased(self, graph_of):
        waits = [n.name for n in find_ops(graph_of().graph, "wait_blocks")]
        assert len(waits) == 6
        for name in waits:
            gm = graph_of()
            gm.graph.erase_node(next(n for n in gm.graph.nodes if n.name == name))
            assert "join" in self.races(gm)

    def test_fork_left_out(self, graph_of):
        forked = [n.name for n in graph_of().graph.nodes if _fork_of(n) is not None]
        assert len(forked) == 6
        for name in forked:
            gm = graph_of()
            node = next(n for n in gm.graph.nodes if n.name == name)
            set_argument(node, "after", None)
            assert node.name in self.races(gm)

    def test_keepalive_dropped(self, graph_of):
        lists = [argument(n, "keepalive") for n in find_ops(graph_of().graph, "wait_blocks")]
        assert sum(map(len, lists)) > 6
        for i, kept in enumerate(lists):
            for j, temporary in enumerate(kept):
                gm = graph_of()
                wait = find_ops(gm.graph, "wait_blocks")[i]
                rest = [n for k, n in enumerate(argument(wait, "keepalive")) if k != j]
                set_argument(wait, "keepalive", rest)
                message = self.races(gm)
                assert "keepalive" in message
                assert temporary.name in message

    def test_nodes_swapped(self, graph_of):
        nodes = [n for n in graph_of().graph.nodes if accesses(n)]
        pairs = [p for p in itertools.combinations(nodes, 2) if conflicts(*p)]
        assert len(pairs) > 50
        for first, second in pairs:
            gm = graph_of()
            by_name = {n.name: n for n in gm.graph.nodes}
            a, b = by_name[first.name], by_name[second.name]
            behind_a, behind_b = a.next, b.next
            behind_a.prepend(b)
            if behind_b is not a:
                behind_b.prepend(a)
            self.races(gm)

    def test_stream_changed(self, graph_of):
        for name in ("hint_scores_0", "hint_select_pages_1"):
            gm = graph_of()
            node = next(n for n in gm.graph.nodes if n.name == name)
            assert argument(node, "stream") == SELECT
            set_argument(node, "stream", COMPUTE)
            self.races(gm)

    def test_result_of_a_selection_that_nobody_takes(self, graph_of):
        gm = graph_of()
        item = next(n for n in gm.graph.nodes if n.name == "hint_is_miss_1")
        for wait in list(item.users):
            kept = argument(wait, "keepalive")
            set_argument(wait, "keepalive", [n for n in kept if n is not item])
        gm.graph.erase_node(item)
        assert "hint_select_pages_1" in self.races(gm)


def _fork_of(node):
    names = {e.name for e in node.target._schema.arguments} if is_sparda(node) else set()
    return argument(node, "after") if "after" in names else None
