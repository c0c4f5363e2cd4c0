from __future__ import annotations

import dataclasses
import functools
import io
import itertools

import pytest
from rich.console import Console

from sparda_compile import explain
from sparda_compile.cli import tables
from sparda_compile.cli.tables import (
    format_layers,
    print_demo,
    print_measured,
    print_report,
)
from sparda_compile.demo.needles import NeedleDemo, NeedleRow
from sparda_compile.demo.run import Demo, DemoRow
from sparda_compile.profiling.measured import measure
from sparda_compile.testing import tiny_llama


@pytest.mark.parametrize(
    ("layers", "text"),
    [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([4, 0, 1, 6, 7], "0-1, 4, 6-7")],
)
def test_format_layers(layers, text):
    assert format_layers(layers) == text


@pytest.fixture(scope="module")
def report():
    return explain(tiny_llama())


def printed(show, value, width=110):
    stream = io.StringIO()
    show(value, Console(file=stream, width=width))
    return stream.getvalue()


def test_report_groups_layers_that_are_alike(report):
    lines = [line.split() for line in printed(print_report, report).splitlines()]
    assert [line[:6] for line in lines if "sdpa" in line] == [
        ["0-1", "sparse", "sdpa", "4", "2", "16"]
    ]
    assert "dense:" not in printed(print_report, report)


def test_report_without_schedules(report):
    text = printed(print_report, dataclasses.replace(report, schedules=()))
    assert "nothing was measured" not in text


def test_demo_marks_the_original_and_counts(report):
    common = {"num_blocks": 8, "prefill_ms": 10.0, "token_ms": 1.5, "full_bytes": 2048}
    original = DemoRow(
        mode="original", blocks=8, agreement=1.0, must_agree=True, device_bytes=2048, **common
    )
    query = DemoRow(
        mode="query", blocks=2, agreement=0.25, must_agree=False, device_bytes=1024, hits=3,
        misses=1, h2d_bytes=1024, d2h_bytes=0, **common,
    )  # fmt: skip
    text = printed(print_demo, Demo(512, 4, (original, query), (), 2, False, report))
    rows = [
        line.split() for line in text.splitlines() if line.lstrip().startswith(("orig", "query"))
    ]
    assert rows[0] == ["original", "8/8", "100%", "100%", "10", "ms", "1.5", "ms"]
    assert rows[1][:5] == ["query", "2/8", "25%", "75%", "1"]
    assert "Forecast" not in text


@pytest.mark.parametrize(("step_us", "step"), [(812.34, "812.3 us"), (None, "an unknown time")])
def test_measured_step(decode_trace, step_us, step):
    measured = measure(
        decode_trace.events, decode_trace.schedule, decode_trace.nodes, "H200", step_us
    )
    lines = [line.split() for line in printed(print_measured, measured).splitlines()]
    assert ["step", "773.7", "us", "850.6", "us", "+76.9", "us"] in lines
    assert any(
        line[:2] == ["overlap", f"{100 * measured.predicted.overlap:.1f}%"] for line in lines
    )
    select = next(times for times in measured.ops() if times.name == "select_pages")
    assert any(
        line[:4] == ["select_pages", "4", "8.0", f"{select.measured_us:.1f}"] for line in lines
    )
    assert sum(line[:1] == ["none"] for line in lines) == 1
    assert not any(line[:1] == ["scores_3"] for line in lines)
    assert f"without it one takes {step}." in " ".join(" ".join(line) for line in lines)


def test_measured_step_node_by_node(decode_trace):
    measured = measure(decode_trace.events, decode_trace.schedule, decode_trace.nodes, "H200")
    text = printed(functools.partial(print_measured, with_nodes=True), measured)
    rows = [line.split()[0] for line in text[text.index("Per node") :].splitlines() if line.split()]
    assert [name for name in rows if "_" in name] == [node.node for node in measured.nodes]


def tables_of(show, value, width):
    """Return the heading lines of each table, and every line."""
    lines = printed(show, value, width).splitlines()
    rules = [i for i, line in enumerate(lines) if set(line.strip()) == {"\u2500"}]
    heads = []
    for rule in rules:
        first = rule
        while lines[first - 1].strip():
            first -= 1
        heads.append(" ".join(lines[first:rule]).split())
    return heads, lines


@pytest.fixture
def heads(monkeypatch):
    """Return the names of the columns of every table that is made."""
    made = []
    original = tables.Table.add_column

    def add_column(self, header, **more):
        made.append(header)
        return original(self, header, **more)

    monkeypatch.setattr(tables.Table, "add_column", add_column)
    return made


@pytest.fixture
def needles(report):
    row = NeedleRow(
        mode="forecast", blocks=26, num_blocks=257, answers=("9999",) * 4, num_right=4,
        recall=0.987, h2d_bytes=123_456_789, step_bytes=12_345_678, device_bytes=9_876_543,
        token_ms=123.4,
    )  # fmt: skip
    rows = (dataclasses.replace(row, mode="dense", recall=None), row)
    return NeedleDemo(16384, ("k",) * 4, ("9999",) * 4, (1, 2, 3, 4), 1000.0, rows, (), report)


@pytest.fixture
def demo(report):
    row = DemoRow(
        mode="forecast", blocks=128, num_blocks=128, agreement=1.0, must_agree=True,
        prefill_ms=12345.0, token_ms=123.4, hits=99999, misses=12345, h2d_bytes=123_456_789,
        d2h_bytes=123_456_789, device_bytes=2048, full_bytes=2048,
    )  # fmt: skip
    return Demo(8192, 24, (row,), (), 2, True, report)


@pytest.mark.parametrize("kind", ["report", "softcap", "deep", "demo", "needles", "measured"])
def test_at_80_columns_every_word_of_a_heading_is_whole(request, heads, decode_trace, kind):
    report = request.getfixturevalue("report")
    show, value = print_report, report
    if kind == "softcap":
        sites = tuple(dataclasses.replace(site, softcap=50.0) for site in report.sites)
        value = dataclasses.replace(report, sites=sites)
    elif kind == "deep":
        module = "language_model.model.decoder.layers.7.temporal_block.self_attention"
        site = dataclasses.replace(report.sites[0], module=module, scale=0.08838834764)
        sites = tuple(dataclasses.replace(site, layer=2 * i) for i in range(40))
        value = dataclasses.replace(report, sites=sites)
    elif kind == "measured":
        show = functools.partial(print_measured, with_nodes=True)
        value = measure(decode_trace.events, decode_trace.schedule, decode_trace.nodes, "H200")
    elif kind != "report":
        show, value = print_demo, request.getfixturevalue(kind)
    found, lines = tables_of(show, value, 80)
    assert sorted(itertools.chain(*found)) == sorted(" ".join(heads).split())
    assert max(map(len, lines)) <= 80
    assert not any("\u2026" in line for line in lines)
