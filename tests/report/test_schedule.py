"""`Schedule`: totals, table, plain values and Chrome trace."""

import dataclasses
import json

import pytest

from sparda_compile.errors import SpardaError
from sparda_compile.isa.streams import COMPUTE, COPY, STREAM_NAMES
from sparda_compile.report.schedule import Schedule, ScheduleRow

KIB = 1 << 10


@pytest.fixture
def schedule():
    rows = (
        ScheduleRow("linear_1", "linear", 0, COMPUTE, 0.0, 10.0, 4 * KIB, 0, 0.0),
        ScheduleRow("view_1", "view", 0, COMPUTE, 10.0, 10.0, 0, 0, 0.0),
        ScheduleRow("prefetch", "sparda.prefetch_blocks", 1, COPY, 10.0, 42.5, 0, 96 * KIB, 0.0),
        ScheduleRow("wait", "sparda.wait_blocks", 1, COMPUTE, 40.0, 42.5, 0, 0, 2.5),
        ScheduleRow("score", "sparda.score_blocks", -1, COMPUTE, 42.5, 44.0, KIB, 0, 0.0),
    )
    return Schedule("decode", "h200", rows, ("layer 1: wait sinks",), 61.25)


@pytest.fixture
def empty():
    return Schedule("prefill", "cpu", (), (), 0.0)


def test_totals(schedule):
    assert schedule.total_us == 44.0
    assert schedule.exposed_us == 2.5
    assert schedule.link_bytes == 96 * KIB


def test_totals_of_nothing(empty):
    assert (empty.total_us, empty.exposed_us, empty.link_bytes) == (0.0, 0, 0)


def test_total_is_the_last_end_and_not_the_end_of_the_last_row(schedule):
    shuffled = dataclasses.replace(schedule, rows=schedule.rows[::-1])
    assert shuffled.total_us == 44.0


def test_str_is_a_summary_and_a_table_of_sparda_nodes(schedule):
    assert str(schedule).split("\n") == [
        "decode on h200: 44.0 us predicted, 61.2 us with copies in line, 2.5 us exposed, "
        "96 KiB over the link",
        "start us  end us   stream  layer  link KiB  exposed  op                      node",
        "    10.0    42.5     copy      1        96           sparda.prefetch_blocks  prefetch",
        "    40.0    42.5  compute      1                2.5  sparda.wait_blocks      wait",
        "    42.5    44.0  compute                            sparda.score_blocks     score",
    ]


def test_str_of_nothing_is_the_summary_and_the_heading(empty):
    summary, heading = str(empty).split("\n")
    assert summary.startswith("prefill on cpu: 0.0 us predicted")
    assert " ".join(heading.split()) == "start us end us stream layer link KiB exposed op node"


def test_to_dict_is_plain_and_complete(schedule):
    plain = json.loads(json.dumps(schedule.to_dict()))
    assert tuple(ScheduleRow(**row) for row in plain.pop("rows")) == schedule.rows
    assert plain == {
        "phase": "decode",
        "machine": "h200",
        "total_us": 44.0,
        "baseline_us": 61.25,
        "exposed_us": 2.5,
        "link_bytes": 96 * KIB,
        "choices": ["layer 1: wait sinks"],
        "speculation": [],
    }


def test_chrome_trace_names_both_streams(schedule, tmp_path):
    path = schedule.to_chrome_trace(tmp_path / "trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == dict(enumerate(STREAM_NAMES))


def test_chrome_trace_has_a_slice_per_row_that_takes_time(schedule, tmp_path):
    path = schedule.to_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads(path.read_text())["traceEvents"]
    slices = {event["args"]["node"]: event for event in events if event["ph"] == "X"}
    assert list(slices) == ["linear_1", "prefetch", "wait", "score"]
    assert slices["prefetch"] == {
        "ph": "X",
        "pid": 0,
        "tid": COPY,
        "name": "sparda.prefetch_blocks",
        "cat": "work",
        "ts": 10.0,
        "dur": 32.5,
        "args": {"node": "prefetch", "layer": 1, "hbm_bytes": 0, "link_bytes": 96 * KIB},
    }
    assert [node for node, event in slices.items() if event["cat"] == "exposed"] == ["wait"]


def test_chrome_trace_of_nothing_has_the_streams_only(empty, tmp_path):
    path = empty.to_chrome_trace(tmp_path / "trace.json")
    assert {event["ph"] for event in json.loads(path.read_text())["traceEvents"]} == {"M"}


def deep(schedule, num_layers=500):
    rows = tuple(
        dataclasses.replace(row, op=f"{row.op}_{layer % 40}", node=f"{row.node}_{layer}")
        for layer in range(num_layers)
        for row in schedule.rows
    )
    return dataclasses.replace(schedule, rows=rows)


def test_repr_is_the_summary_and_the_longest_ops(schedule):
    assert repr(schedule).split("\n") == [
        f"<Schedule of {schedule.summary}>",
        "nodes  us in all  exposed us  op",
        "    1       32.5              sparda.prefetch_blocks",
        "    1       10.0              linear",
        "    1        2.5         2.5  sparda.wait_blocks",
        "    1        1.5              sparda.score_blocks",
        "    1        0.0              view",
        "5 nodes; print() shows those of sparda, to_html(path) draws all.",
    ]


def test_shown_at_a_prompt_it_is_one_screen_however_deep_the_model(schedule):
    many = deep(schedule)
    assert len(str(many)) > 100_000
    lines = repr(many).split("\n")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 130
    assert many._repr_html_().count("<tr>") == 13


def test_name_of_an_op_cannot_break_a_prompt_or_a_notebook(schedule):
    hostile = dataclasses.replace(schedule.rows[0], op="<b>[red]" + "x" * 500)
    shown = dataclasses.replace(schedule, rows=(hostile,))
    assert max(map(len, repr(shown).split("\n"))) <= 130
    assert "[red]xx" in repr(shown)
    assert "<b>" not in shown._repr_html_()


@pytest.mark.parametrize("write", ["to_html", "to_chrome_trace"])
def test_bad_path_is_a_sentence_and_leaves_nothing(schedule, tmp_path, write):
    (tmp_path / "file").write_text("old")
    for path in (tmp_path, tmp_path / "file" / "page", "", None, tmp_path / ("n" * 300), "a\0b"):
        with pytest.raises(SpardaError, match=r"cannot be written|no path"):
            getattr(schedule, write)(path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_chrome_trace_makes_its_folders(schedule, tmp_path):
    assert schedule.to_chrome_trace(tmp_path / "a" / "b" / "t.json").is_file()
