"""One replay as rows of a timeline."""

from __future__ import annotations

import itertools

import pytest

from sparda_compile.isa.streams import ATTEND, COMPUTE, COPY
from sparda_compile.profiling.kernel_trace import Kernel, PlannedNode, read_kernels, split_replays
from sparda_compile.profiling.replay import MODEL, WAIT, Replay, totals_of

NODES = (
    PlannedNode("fork", "sparda.fork_stream", 0, COMPUTE, ()),
    PlannedNode("fetch", "sparda.prefetch_blocks", 0, COPY, ("_gather",), 1),
    PlannedNode("wait", WAIT, 0, COMPUTE, (), 1),
    PlannedNode("append", "sparda.append_kv", 0, COMPUTE, ("_append_kv",)),
    PlannedNode("attend", "sparda.sparse_attention", 0, COMPUTE, ("_partials", "_merge")),
    PlannedNode("store", "sparda.offload_blocks", 0, COPY, ("_store_tail",), 2),
    PlannedNode("last_wait", WAIT, 0, COMPUTE, (), 2),
    PlannedNode("advance", "sparda.advance_lengths", -1, COMPUTE, ()),
)
# Name, start, end, on a clock that begins at 100.
STEP = (
    ("gemm", 100, 110),
    ("_gather", 105, 140),
    ("fused", 111, 121),
    ("_append_kv", 141, 143),
    ("_partials", 144, 150),
    ("_merge", 151, 154),
    ("gemm", 155, 165),
    ("_store_tail", 160, 180),
    ("add", 181, 182),
)


def replay(step=STEP, nodes=NODES):
    return Replay([Kernel(name, float(a), float(b), 1) for name, a, b in step], nodes)


def spans(rows):
    return {row.node: (row.start_us, row.end_us) for row in rows}


def test_rows_begin_at_zero_and_are_whole():
    rows = replay().rows()
    assert spans(rows) == {
        "model_before_append": (0.0, 21.0),
        "fetch": (5.0, 40.0),
        "wait": (21.0, 40.0),
        "append": (41.0, 43.0),
        "attend": (44.0, 54.0),
        "model_end": (55.0, 82.0),
        "store": (60.0, 80.0),
        "last_wait": (65.0, 80.0),
    }
    assert [row.start_us for row in rows] == sorted(row.start_us for row in rows)


def test_model_counts_to_the_layer_before():
    layers = {row.node: row.layer for row in replay().rows() if row.op == MODEL}
    assert layers == {"model_before_append": -1, "model_end": 0}


def test_wait_is_the_time_that_compute_stands_still():
    exposed = {row.node: row.exposed_us for row in replay().rows() if row.op == WAIT}
    assert exposed == {"wait": 19.0, "last_wait": 15.0}


@pytest.mark.parametrize(("gather_ends", "exposed"), [(115, 0.0), (121, 0.0), (131, 10.0)])
def test_copy_that_ends_under_compute_exposes_nothing(gather_ends, exposed):
    step = [("_gather", 105, gather_ends) if name == "_gather" else (name, a, b)
            for name, a, b in STEP]  # fmt: skip
    rows = {row.node: row for row in replay(step).rows()}
    assert rows["wait"].exposed_us == exposed
    assert rows["wait"].end_us - rows["wait"].start_us == exposed


def test_two_waits_in_one_gap_share_it():
    nodes = list(NODES)
    nodes[2:2] = [
        PlannedNode("fetch_too", "sparda.prefetch_blocks", 1, COPY, ("_gather",), 3),
        PlannedNode("second_wait", WAIT, 1, COMPUTE, (), 3),
    ]
    nodes[3], nodes[4] = nodes[4], nodes[3]
    step = [("_gather", 105, 130), ("_gather", 131, 140), *(s for s in STEP if s[0] != "_gather")]
    rows = spans(replay(sorted(step, key=lambda each: each[1]), nodes).rows())
    assert (rows["wait"], rows["second_wait"]) == ((21.0, 30.0), (30.0, 40.0))


def test_copy_that_ended_before_is_no_wait():
    # It ends in a gap of the compute stream, before the node that the wait stands behind.
    step = [(name, a, b) for name, a, b in STEP if name != "_gather"]
    step.append(("_gather", 105, 120))
    step = [("_store_tail", 141, 144) if s[0] == "_store_tail" else s for s in step]
    rows = {r.node: r for r in replay(sorted(step, key=lambda each: each[1])).rows()}
    assert rows["last_wait"].exposed_us == 0.0


def test_model_inside_a_node_is_in_the_next_row():
    step = [*STEP[:5], ("relu", 150.2, 150.8), *STEP[5:]]
    rows = spans(replay(step).rows())
    assert rows["model_end"] == pytest.approx((50.2, 82.0))
    assert "model_before_attend" not in rows
    assert rows["attend"] == (44.0, 54.0)


def test_a_wait_for_a_mark_ends_when_its_stream_has_come_to_it():
    """A mark launches nothing: it is reached with the last work before it on its stream."""
    nodes = (
        PlannedNode("fork", "sparda.fork_stream", 0, COMPUTE, (), 4),
        PlannedNode("early", "sparda.attend_predicted", 0, ATTEND, ("_attend_blocks",)),
        PlannedNode("parts", "sparda.record_event", 0, ATTEND, (), 5),
        PlannedNode("scores", "sparda.score_blocks", 0, COMPUTE, ("_score",)),
        PlannedNode("wait", WAIT, 0, COMPUTE, (), 5),
        PlannedNode("repair", "sparda.repair_predicted", 0, COMPUTE, ("_repair_predicted",)),
        PlannedNode("update", "sparda.update_prediction", 0, ATTEND, ("_update",)),
        PlannedNode("last", "sparda.record_event", 0, ATTEND, (), 6),
        PlannedNode("last_wait", WAIT, 0, COMPUTE, (), 6),
    )
    step = (
        ("gemm", 100, 110),
        ("_attend_blocks", 111, 130),
        ("_score", 112, 120),
        ("_repair_predicted", 131, 135),
        ("_update", 136, 138),
        ("gemm", 136, 150),
    )
    measured = replay(step, nodes)
    rows = measured.rows()
    assert spans(rows)["wait"] == (20.0, 30.0)
    assert {row.node: row.exposed_us for row in rows if row.op == WAIT} == {
        "wait": 10.0,
        "last_wait": 0.0,
    }
    totals = measured.totals(rows)
    assert (totals.attend_us, totals.exposed_us, totals.step_us) == (21.0, 10.0, 50.0)
    # Beside compute are 112-120 of the early attention, and all of the update.
    assert totals.attend_overlap == pytest.approx(10 / 21)


def test_totals():
    measured = replay()
    totals = measured.totals(measured.rows())
    assert (totals.step_us, totals.compute_us, totals.copy_us) == (82.0, 42.0, 55.0)
    assert totals.exposed_us == 34.0
    # _gather lies under 105-110 and 111-121, _store_tail under 160-165.
    assert totals.overlap == pytest.approx(20 / 55)


def test_totals_of_overlapping_spans_count_time_once():
    spans = ([(0.0, 4.0), (2.0, 6.0), (9.0, 9.0)], [(5.0, 8.0), (5.0, 7.0)], [(1.0, 2.5)])
    totals = totals_of(spans, 1.5)
    assert totals.select_us == 1.5
    assert (totals.step_us, totals.compute_us, totals.copy_us) == (8.0, 6.0, 3.0)
    assert (totals.overlap, totals.exposed_us) == (pytest.approx(1 / 3), 1.5)


def test_repairs_are_copies():
    beside = [(2.0, 5.0)]
    totals = totals_of(([(0.0, 4.0)], [(1.0, 3.0)], [], [], beside), 0.0)
    assert (totals.copy_us, totals.overlap) == (4.0, pytest.approx(3 / 4))
    assert totals.attend_us == 0.0


def test_totals_without_copies():
    totals = totals_of(([], [], []), 0.0)
    assert (totals.step_us, totals.overlap, totals.attend_overlap) == (0.0, 1.0, 1.0)


def test_real_replay_is_covered(decode_trace):
    for kernels in split_replays(read_kernels(decode_trace.events)):
        measured = Replay(kernels, decode_trace.nodes)
        rows = measured.rows()
        compute = sorted((r.start_us, r.end_us) for r in rows if r.stream == COMPUTE)
        for (_, end), (start, _) in itertools.pairwise(compute):
            assert start >= end - 0.3  # nothing runs twice on the compute stream
        # What no row covers is the time between two kernels.
        length = max(k.end_us for k in kernels) - kernels[0].start_us
        assert sum(end - start for start, end in compute) > 0.97 * length


def test_first_replay_waits_for_every_block(decode_trace):
    first, second = (
        {row.node: row.exposed_us for row in Replay(kernels, decode_trace.nodes).rows()}
        for kernels in split_replays(read_kernels(decode_trace.events))
    )
    assert first["wait_blocks_0"] == pytest.approx(123.1, abs=0.1)
    assert first["wait_blocks_1"] == pytest.approx(39.3, abs=0.1)
    assert sum(second.values()) == pytest.approx(4.6, abs=0.1)
