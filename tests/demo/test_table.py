"""What the terminal shows of a demo is on its page: every mode, the needles, the times."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from sparda_compile import explain
from sparda_compile.demo.needles import NeedleDemo, NeedleRow
from sparda_compile.demo.run import Demo, DemoRow
from sparda_compile.demo.table import table_of, write_demo
from sparda_compile.errors import ConfigError

RIGHT = ("1111", "2222", "3333", "4444")


@pytest.fixture(scope="module")
def report(shared_llama):
    return explain(shared_llama)


@pytest.fixture
def needles(report):
    row = NeedleRow(
        mode="query", blocks=6, num_blocks=64, answers=RIGHT, num_right=4, recall=0.59,
        h2d_bytes=3 << 20, step_bytes=1 << 19, device_bytes=5 << 20, token_ms=24.4,
    )  # fmt: skip
    rows = (
        dataclasses.replace(row, mode="dense", recall=None),
        row,
        dataclasses.replace(row, mode="exact", answers=("9999", *RIGHT[1:]), num_right=3),
    )
    return NeedleDemo(4084, ("a", "b", "c", "<d>"), RIGHT, (5, 6, 7, 8), 1250.0, rows, (), report)


@pytest.fixture
def demo(report):
    common = {"num_blocks": 8, "prefill_ms": 10.0, "token_ms": 1.5, "full_bytes": 2048}
    original = DemoRow(
        mode="original", blocks=8, agreement=1.0, must_agree=True, device_bytes=2048, **common
    )
    wrong = dataclasses.replace(original, mode="dense", agreement=0.5)
    return Demo(512, 4, (original, wrong), (), 2, True, report)


def shown_on(path):
    page = path.read_text(encoding="ascii")
    (found,) = re.findall(r'<script type="application/json" id="payload">(.*?)</script>', page)
    return json.loads(found)["demo"]


def test_needles_of_every_mode(needles):
    table = table_of(needles)
    assert [row[:3] for row in table.rows] == [
        ("dense", "4 of 4", "1111 2222 3333 4444"),
        ("query", "4 of 4", "1111 2222 3333 4444"),
        ("exact", "3 of 4", "9999 2222 3333 4444"),
    ]
    assert table.rows[1][3:] == ("6/64", "59%", "3.0 MiB", "512.0 KiB", "5.0 MiB", "24 ms")
    assert table.wrong == (False, False, True)
    assert "a: 1111, at token 5" in table.before[1]


def test_modes_beside_the_original(demo):
    table = table_of(demo)
    assert [row[0] for row in table.rows] == ["original", "dense"]
    assert table.wrong == (False, True)
    assert any("not trained" in note for note in table.notes)
    plain = dataclasses.replace(demo, used_fresh_forecast=False)
    assert not any("not trained" in note for note in table_of(plain).notes)


@pytest.mark.parametrize("kind", ["needles", "demo"])
def test_page_holds_the_table_of_the_terminal(request, tmp_path, kind):
    found = request.getfixturevalue(kind)
    path = write_demo(found, tmp_path / "demo.html")
    plain = json.loads(json.dumps(dataclasses.asdict(table_of(found))))
    assert shown_on(path) == plain
    assert all(len(row) == len(plain["columns"]) for row in plain["rows"])


def test_bad_path_is_a_sentence(needles, tmp_path):
    with pytest.raises(ConfigError, match="it is a folder"):
        write_demo(needles, tmp_path)
