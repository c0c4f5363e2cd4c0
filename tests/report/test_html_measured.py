"""Measured rows on the inspection page: below the schedule's, with the same tools."""

from __future__ import annotations

import json
import re

import pytest

from sparda_compile.profiling.measured import measure
from sparda_compile.report.html import write_html

ACTIONS = """<script>
    const view = document.querySelector("[data-testid=timeline-decode]");
    const box = view.getBoundingClientRect();
    const at = (y) => ({ clientX: box.left + 200, clientY: box.top + y, pointerType: "mouse" });
    view.dispatchEvent(new PointerEvent("pointermove", at(270)));
    view.dispatchEvent(new PointerEvent("pointerdown", at(220)));
    view.dispatchEvent(new PointerEvent("pointerup", at(220)));
    document.getElementById("found").title = view.scrollWidth > 2 * box.width;
</script></body>"""


@pytest.fixture(scope="module")
def measured(decode_trace):
    return measure(decode_trace.events, decode_trace.schedule, decode_trace.nodes, "H200")


@pytest.fixture(scope="module")
def page(measured, tmp_path_factory):
    return measured.to_html(tmp_path_factory.mktemp("page") / "page.html")


def payload_of(path):
    text = path.read_text(encoding="ascii")
    (found,) = re.findall(r'<script type="application/json" id="payload">(.*?)</script>', text)
    return json.loads(found)


def test_payload_holds_the_measured_rows(measured, page):
    payload = payload_of(page)
    rows = [dict(zip(payload["row_fields"], row, strict=True)) for row in
            payload["measured"]["decode"]]  # fmt: skip
    assert [(r["node"], r["start_us"], r["end_us"], r["exposed_us"]) for r in rows] == [
        (r.node, r.start_us, r.end_us, r.exposed_us) for r in measured.rows
    ]


def test_page_without_a_run_has_none(decode_trace, tmp_path):
    path = write_html(tmp_path / "a.html", title="t", schedules=[decode_trace.schedule])
    assert payload_of(path)["measured"] == {}
    alone = decode_trace.schedule.to_html(tmp_path / "b.html")
    assert payload_of(alone)["measured"] == {}


@pytest.mark.browser
def test_browser_draws_a_lane_for_each_stream(measured, decode_trace, browse, page):
    shown = browse(page)
    everything = (*decode_trace.schedule.rows, *measured.rows)
    bars = shown.having("bar")
    assert len(bars) == sum(row.end_us > row.start_us for row in everything)
    assert len({bar["y"] for bar in bars}) == 4
    assert sum("model" in bar["class"].split() for bar in bars) == 5
    for what in ("predicted", "measured"):
        for stream in ("compute", "copy", "select"):
            assert f"{stream}, {what}" in shown.texts["main"][0]
    text = shown.texts["stats"][0]
    assert "Measured step" in text
    assert "850.6" in text
    # One row for each op that was measured.
    assert len(shown.having("ops-decode-row")) == len(measured.ops())
    selected = next(t for t in measured.ops() if t.name == "select_pages")
    assert any(
        text.startswith(f"select_pages{selected.count}8.0{selected.measured_us:.1f}+")
        for text in shown.texts["ops-decode-row"]
    )


@pytest.mark.browser
def test_browser_points_at_what_was_measured(browse, page, tmp_path):
    played = tmp_path / "played.html"
    played.write_text(page.read_text(encoding="ascii").replace("</body>", ACTIONS))
    shown = browse(played)
    tip = shown.texts["tip"][0]
    assert "measured" in tip
    assert "device memory" not in tip
    # A click on a layer of the lower timeline zooms to it.
    assert shown.having("found")[0]["title"] == "true"
