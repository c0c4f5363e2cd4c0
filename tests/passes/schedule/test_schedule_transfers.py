"""ScheduleTransfers: where copies start, where they are awaited, and what the prediction says."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from sparda_compile.graph.dependences import dependence_graph, mark_order
from sparda_compile.graph.effects import argument, stream_of, takes
from sparda_compile.graph.nodes import call_name, find_ops, is_sparda, program_order
from sparda_compile.isa.streams import COMPUTE, COPY, SELECT, STREAM_NAMES
from sparda_compile.passes.base import PassContext
from sparda_compile.passes.machine import MACHINES
from sparda_compile.passes.schedule.simulate import predict

CASES = {
    "forecast-h200": {"mode": "forecast", "machine": "h200", "max_tokens": 131072},
    "forecast-cpu": {"mode": "forecast", "machine": "cpu"},
    "forecast-h200-large": {"mode": "forecast", "machine": "h200", "batch_size": 64},
    "exact-h200": {"mode": "exact", "machine": "h200"},
    "exact-previous_step-h200": {"mode": "exact", "hint": "previous_step", "machine": "h200"},
    "exact-previous_layer-h200": {"mode": "exact", "hint": "previous_layer", "machine": "h200"},
    "query-h200": {"mode": "query", "machine": "h200"},
    "prefill-h200": {"mode": "forecast", "machine": "h200", "phase": "prefill"},
    "sparse_prefill-h200": {"mode": "forecast", "machine": "h200", "phase": "sparse_prefill"},
    "sparse_prefill-cpu": {"mode": "forecast", "machine": "cpu", "phase": "sparse_prefill"},
    "window-h200": {"mode": "forecast", "machine": "h200", "model": "gemma3"},
}
EPSILON = 1e-6


@pytest.fixture
def scheduled(plan_of):
    """Return a function that gives the graphs before and behind this pass, and its record."""

    def schedule(model="llama", phase="decode", **settings):
        plan = plan_of(model, phase, **settings)
        record = next(s for s in plan.stages if s.name == "schedule_transfers")
        return plan.stage("fuse_selection").graph, record.graph_module.graph, record

    return schedule


def places(graph):
    return {n.name: i for i, n in enumerate(graph.nodes)}


def named(graph, name):
    return next(n for n in graph.nodes if n.name == name)


class TestOrder:
    def test_prefetch_comes_before_the_attention_of_the_layer_before(self, scheduled):
        before, after, record = scheduled(**CASES["forecast-cpu"])
        was, now = places(before), places(after)
        assert was["prefetch_1"] > was["sparse_attention_0"]
        assert now["prefetch_1"] < now["wait_blocks_0"] < now["sparse_attention_0"]
        assert record.counts["chains"] == 2
        assert record.counts["moved"] > 0

    def test_wait_stays_at_its_consumer(self, scheduled):
        _, after, _ = scheduled(**CASES["forecast-h200"])
        now = places(after)
        for layer in (0, 1):
            (wait,) = named(after, f"prefetch_{layer}").users
            assert wait.next is named(after, f"append_kv_{layer}")
            projections = [n for n in after.nodes if call_name(n) == "linear"]
            assert sum(now["prefetch_1"] < now[n.name] < now[wait.name] for n in projections) >= 3

    def test_hint_is_fetched_while_the_layer_before_runs(self, scheduled):
        _, after, _ = scheduled(**CASES["exact-h200"])
        now = places(after)
        (wait,) = named(after, "hint_prefetch_1").users
        assert now["attend_missing_0"] < now[wait.name] < now["plan_1"]
        # Beside the model's products: behind attention, whose kernels are small.
        projections = [n for n in after.nodes if call_name(n) == "linear"]
        assert now["attend_missing_0"] < now["hint_prefetch_1"]
        assert sum(now["hint_prefetch_1"] < now[n.name] < now[wait.name] for n in projections) >= 3

    def test_repair_stays_around_its_attention(self, scheduled):
        _, after, record = scheduled(**CASES["exact-h200"])
        now = places(after)
        for layer in (0, 1):
            (wait,) = named(after, f"prefetch_{layer}").users
            resident, missing = f"attend_resident_{layer}", f"attend_missing_{layer}"
            assert now[f"plan_{layer}"] < now[f"append_kv_{layer}"] < now[f"prefetch_{layer}"]
            assert now[f"prefetch_{layer}"] < now[resident] < now[wait.name] < now[missing]
        assert record.counts["chains"] == 2

    def test_offload_of_a_prefill_is_awaited_one_layer_later(self, scheduled):
        before, after, record = scheduled(**CASES["prefill-h200"])
        was, now = places(before), places(after)
        assert was["wait_blocks_0"] > was["prefill_attention_1"]
        assert now["wait_blocks_0"] < now["prefill_attention_1"]
        assert now["wait_blocks_0"] > now["offload_blocks_0"]
        assert now["wait_blocks_1"] > now["offload_blocks_1"]
        assert record.schedule.choices == (
            "offload_blocks_0 is awaited before prefill_attention_1",
        )

    @pytest.mark.parametrize("machine", ["cpu", "h200"])
    def test_past_of_a_prompt_is_fetched_while_the_layer_before_computes(self, scheduled, machine):
        before, after, record = scheduled(**CASES[f"sparse_prefill-{machine}"])
        was, now = places(before), places(after)
        assert was["past_1"] > was["attend_tokens_0"]
        assert now["past_1"] < now["stage_1"] < now["staged_1"] < now["attend_tokens_0"]
        (wait,) = named(after, "staged_1").users
        assert wait.next is named(after, "update_summary_1")
        assert now["attend_tokens_0"] < now[wait.name] < now["block_ids_1"]
        # Offloads are still awaited a layer later.
        (offloaded,) = named(after, "offload_blocks_0").users
        assert now["offload_blocks_0"] < now[offloaded.name] < now["attend_tokens_1"]
        assert record.counts["chains"] == 2
        streams = [stream_of(named(after, name)) for name in ("past_1", "stage_1")]
        assert streams == [SELECT if machine == "h200" else COMPUTE, COPY]
        # The copy takes the list of the selection, which the wait for the copy keeps.
        assert argument(named(after, "stage_1"), "after") is (
            None if machine == "h200" else named(after, "fork_1")
        )

    def test_mode_query_has_nothing_to_place(self, scheduled):
        before, after, record = scheduled(**CASES["query-h200"])
        assert [n.name for n in before.nodes] == [n.name for n in after.nodes]
        assert record.counts["chains"] == record.counts["moved"] == 0
        assert record.schedule.choices == ()

    @pytest.mark.parametrize("case", CASES)
    def test_nothing_is_created_or_deleted(self, scheduled, case):
        before, after, _ = scheduled(**CASES[case])
        assert Counter(map(_signature, before.nodes)) == Counter(map(_signature, after.nodes))

    @pytest.mark.parametrize("case", CASES)
    def test_every_dependence_of_the_program_is_kept(self, scheduled, case):
        before, after, _ = scheduled(**CASES[case])
        mark_order(before)
        now = places(after)
        forks = {n.name for n in find_ops(before, "fork_stream")}  # these get inputs of their own
        edges = [(a.name, b.name) for a, b in dependence_graph(before).edges]
        kept = {w.name: argument(w, "keepalive") for w in find_ops(before, "wait_blocks")}
        for first, second in edges:
            if second not in forks and first not in {n.name for n in kept.get(second, ())}:
                assert now[first] < now[second], (first, second)


def _signature(node):
    """What of a node the scheduler may not change: all but stream, fork and keepalives."""
    if not is_sparda(node):
        return (node.name, node.op, str(node.target), str(node.args), str(node.kwargs))
    free = {"stream", "after", "keepalive"}
    if call_name(node) == "sparda.fork_stream":
        free |= {"inputs"}
    names = [e.name for e in node.target._schema.arguments if e.name not in free]
    return (node.name, node.op, str(node.target), str([argument(node, n) for n in names]))


class TestStreams:
    """The cost model decides what runs beside the copy."""

    STAGES = ("scores_1", "select_pages_1")

    def streams(self, graph):
        return tuple(stream_of(named(graph, name)) for name in self.STAGES)

    def test_small_batch_leaves_the_critical_path_whole(self, scheduled):
        _, after, record = scheduled(mode="forecast", machine="h200", expected_overlap=0.9)
        assert self.streams(after) == (SELECT, SELECT)
        assert argument(named(after, "scores_1"), "after") is named(after, "fork_1")
        assert argument(named(after, "prefetch_1"), "after") is None
        assert "scores_1, select_pages_1 on the select stream" in record.schedule.choices[1]

    @pytest.mark.parametrize("batch_size", [1, 16, 64])
    @pytest.mark.parametrize("overlap", [0.0, 0.9, 1.0])
    def test_no_copy_waits_for_the_selection_behind_it(self, scheduled, overlap, batch_size):
        """However busy the link is: the next selection runs while it copies."""
        settings = {"mode": "forecast", "machine": "h200", "max_tokens": 8192}
        _, after, record = scheduled(expected_overlap=overlap, batch_size=batch_size, **settings)
        assert self.streams(after) == (SELECT, SELECT)
        rows = {row.node: row for row in record.schedule.rows}
        before = max(rows["fork_1"].end_us, rows["select_pages_0"].end_us)
        assert rows["scores_1"].start_us == pytest.approx(before)

    def test_chain_of_three_stages_leaves_as_a_whole(self, plan_of):
        settings = {"mode": "forecast", "machine": "h200", "disable_passes": ("fuse_selection",)}
        graph = plan_of("llama", **settings).graph_module.graph
        names = ("scores_1", "block_ids_1", "plan_1")
        assert [stream_of(named(graph, name)) for name in names] == [SELECT] * 3

    def test_machine_without_overlap_gains_nothing_from_other_streams(self, scheduled):
        _, after, record = scheduled(**CASES["forecast-cpu"])
        assert self.streams(after) == (COMPUTE, COMPUTE)
        assert record.counts["on_select_stream"] == 0
        assert record.counts["on_copy_stream"] == len(
            find_ops(after, "prefetch_blocks", "offload_blocks")
        )

    @pytest.mark.parametrize("batch_size", [1, 16, 64])
    def test_it_is_predicted_to_be_faster_than_what_it_began_with(self, plan_of, batch_size):
        settings = {"mode": "forecast", "machine": "h200", "batch_size": batch_size}
        begun = plan_of("llama", disable_passes=("schedule_transfers",), **settings)
        assert begun.schedule is None
        schedule = plan_of("llama", **settings).schedule
        before = max(r.end_us for r in predicted(begun, "h200", "decode"))
        assert schedule.total_us < before <= schedule.baseline_us + EPSILON


def predicted(plan, machine, phase):
    """Return the rows that the cost model gives to a plan's graph as it stands."""
    machine = MACHINES[machine]
    layout = plan.layout
    ctx = PassContext(
        layout.config, phase, {}, "Model", layout.traced(), machine, layout.batch_size
    )
    return predict(plan.graph_module.graph, ctx)


@pytest.mark.parametrize("case", CASES)
class TestPrediction:
    @pytest.fixture
    def schedule(self, scheduled, case):
        return scheduled(**CASES[case])[2].schedule

    def test_rows_on_one_stream_never_overlap(self, schedule):
        for stream in range(len(STREAM_NAMES)):
            rows = [r for r in schedule.rows if r.stream == stream]
            ends = [0.0, *(r.end_us for r in rows)]
            assert all(r.end_us >= r.start_us for r in rows)
            assert all(r.start_us >= end - EPSILON for r, end in zip(rows, ends, strict=False))

    def test_total_is_the_last_end_and_less_than_in_line(self, schedule):
        assert schedule.total_us == max(r.end_us for r in schedule.rows)
        assert 0 < schedule.total_us <= schedule.baseline_us + EPSILON

    def test_wait_exposes_what_its_copy_is_late(self, schedule, scheduled, case):
        _, graph, _ = scheduled(**CASES[case])
        rows = {r.node: r for r in schedule.rows}
        waits = [n for n in graph.nodes if call_name(n) == "sparda.wait_blocks"]
        for wait in waits:
            mine, copy = rows[wait.name], rows[argument(wait, "ticket").name]
            if schedule.machine == "h200":
                expected = max(copy.end_us - mine.start_us, 0.0)
                assert mine.exposed_us == pytest.approx(expected)
                assert mine.end_us >= copy.end_us - EPSILON
            assert mine.end_us - mine.start_us == pytest.approx(mine.exposed_us)
        exposed = {r.node for r in schedule.rows if r.exposed_us}
        assert exposed <= {w.name for w in waits}
        assert schedule.exposed_us == pytest.approx(sum(rows[n].exposed_us for n in exposed))

    def test_side_streams_start_behind_their_forks(self, schedule, scheduled, case):
        _, graph, _ = scheduled(**CASES[case])
        rows = {r.node: r for r in schedule.rows}
        for node in graph.nodes:
            if stream_of(node) == COMPUTE or not takes(node, "after"):
                continue
            if argument(node, "after"):
                fork = rows[argument(node, "after").name]
                assert rows[node.name].start_us >= fork.start_us - EPSILON

    def test_results_are_there_before_they_are_used(self, schedule, scheduled, case):
        _, graph, _ = scheduled(**CASES[case])
        rows = {r.node: r for r in schedule.rows}
        for node in graph.nodes:
            for source in node.all_input_nodes:
                both = {node.name, source.name} <= set(rows)
                if both and call_name(node) not in ("sparda.wait_blocks", "sparda.fork_stream"):
                    assert rows[node.name].start_us >= rows[source.name].end_us - EPSILON

    def test_rows_are_the_graph_in_program_order(self, schedule, scheduled, case):
        _, graph, _ = scheduled(**CASES[case])
        order = program_order(graph)
        by_name = {n.name: n for n in graph.nodes}
        at = [order[by_name[r.node]] for r in schedule.rows]
        assert at == sorted(at)
        assert {n.name for n in graph.nodes if is_sparda(n)} <= {r.node for r in schedule.rows}
        assert {r.stream for r in schedule.rows if not r.op.startswith("sparda.")} == {COMPUTE}

    def test_prediction_is_repeatable(self, schedule, plan_of, case):
        settings = dict(CASES[case])
        model, phase = settings.pop("model", "llama"), settings.pop("phase", "decode")
        plan = plan_of(model, phase, **settings)
        rows = predicted(plan, schedule.machine, phase)
        assert [dataclasses.astuple(r) for r in rows] == [
            dataclasses.astuple(r) for r in schedule.rows
        ]
