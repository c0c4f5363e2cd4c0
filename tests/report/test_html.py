"""The inspection page: what is embedded in it, and what a browser makes of it."""

import dataclasses
import itertools
import json
import re

import pytest

from sparda_compile.isa.streams import COMPUTE, COPY
from sparda_compile.report import LayerPlan, PassSummary, Report, SiteSummary
from sparda_compile.report.html import write_html
from sparda_compile.report.schedule import Schedule, ScheduleRow

HOSTILE = "</script><b>x \"'&amp; \u00e9\u2028 \U0001f600 @@payload $title {{ title }}"

# Of one layer: name, what it calls, microseconds.
LAYER = """
rms_norm        rms_norm                2.1
q_proj          linear                  9.4
rope            mul                     1.7
append_kv       sparda.append_kv        2.6
forecast        linear                  2.9
score_blocks    sparda.score_blocks     5.5
select_blocks   sparda.select_blocks    4.1
prefetch_blocks sparda.prefetch_blocks 38.0
wait_blocks     sparda.wait_blocks      0.0
attention       sparda.attention       12.3
o_proj          linear                  9.4
add             add                     1.1
gate_up_proj    linear                 34.0
silu            silu                    1.9
down_proj       linear                 17.0
view            view                    0.0
"""
OPS = [line.split() for line in LAYER.strip().split("\n")]


def make_schedule(phase="decode", num_layers=4, slowdown=1.0):
    rows = []
    clock = copied = arrived = 0.0
    for layer, (name, op, text) in itertools.product(range(num_layers), OPS):
        node, us = f"{name}_{layer}", float(text)
        if name == "prefetch_blocks":
            arrived, start = copied, max(clock, copied)
            copied = start + us * slowdown * (1 + layer % 3)
            row = ScheduleRow(node, op, layer + 1, COPY, start, copied, 1 << 20, 1 << 20, 0.0)
        else:
            exposed = max(arrived - clock, 0.0) if name == "wait_blocks" else 0.0
            start, clock = clock, clock + us + exposed
            row = ScheduleRow(node, op, layer, COMPUTE, start, clock, 1 << 16, 0, exposed)
        rows.append(row)
    rows.append(ScheduleRow("lm_head", "linear", -1, COMPUTE, clock, clock + 60.0, 1 << 28, 0, 0.0))
    choices = tuple(
        f"layer {layer}: prefetch_blocks starts after forecast_{layer - 1}, "
        f"wait sinks to attention_{layer}; {'hidden' if layer % 3 else 'partly exposed'}"
        for layer in range(1, num_layers)
    )
    return Schedule(phase, "h200", tuple(rows), choices, clock * 1.31 + 60.0)


def make_graph(num_layers, ops):
    lines = ["graph():", "    %input_ids : [num_users=1] = placeholder[target=input_ids]"]
    for layer, (name, op, _) in itertools.product(range(num_layers), ops):
        lines.append(
            f"    %{name}_{layer} : bf16[1, 1, 4096] [num_users=1] = "
            f"call_function[target={op}](args = (%x_{layer}, %p_layers_{layer}_{name}_weight))"
        )
    return "\n".join([*lines, "    return x"])


def make_passes(phase, num_layers):
    captured = [op for op in OPS if "." not in op[1]]
    replaced = [op for op in OPS if not re.search("fetch|wait", op[0])]
    graphs = [make_graph(num_layers, ops) for ops in (captured, captured, replaced, OPS)]
    names = ("mark_sites", "replace_attention", "insert_prefetch")
    return tuple(
        PassSummary(phase, name, {"sites": 4}, 1.25, a.count("\n"), b.count("\n"), a, b)
        for name, a, b in zip(names, graphs[:-1], graphs[1:], strict=True)
    )


def make_site(layer):
    module = f"model.layers.{layer}.self_attn"
    kind, reason, window = ("window", "sliding window", 1024) if layer == 3 else ("sparse", "", 0)
    sizes = (32, 8, 128, 128**-0.5, window, 0.0)
    return SiteSummary(layer, module, "sdpa", kind, reason, *sizes, f"{module}.q_proj", "rope")


def make_report(num_layers=4, **changes):
    report = Report(
        model="LlamaForCausalLM",
        mode="forecast",
        batch_size=4,
        max_tokens=131072,
        sites=tuple(make_site(layer) for layer in range(num_layers)),
        layers=tuple(LayerPlan(i, 1 << 30, 3 << 24, 1 << 22, 1 << 16) for i in range(num_layers)),
        passes=make_passes("prefill", num_layers) + make_passes("decode", num_layers),
        schedules=(make_schedule("decode", num_layers), make_schedule("prefill", num_layers, 2.4)),
        forecast_parameters=num_layers * 4194304,
        model_parameters=8030261248,
    )
    return dataclasses.replace(report, **changes)


def make_hostile_report():
    report = make_report(2)
    summary = dataclasses.replace(report.passes[0], name=HOSTILE, after=f"a\n{HOSTILE}\n")
    schedule = report.schedules[0]
    rows = (dataclasses.replace(schedule.rows[0], node=HOSTILE, op=HOSTILE), *schedule.rows[1:])
    return dataclasses.replace(
        report,
        model=HOSTILE,
        passes=(summary,),
        schedules=(dataclasses.replace(schedule, rows=rows, choices=(HOSTILE,)),),
        sites=(dataclasses.replace(report.sites[0], kind="dense", reason=HOSTILE),),
        error=HOSTILE,
    )


def write_report(path, report):
    title = f"sparda: {report.model}"
    return write_html(path, title=title, schedules=report.schedules, report=report)


def payload_of(path):
    page = path.read_text(encoding="ascii")
    (found,) = re.findall(r'<script type="application/json" id="payload">(.*?)</script>', page)
    return json.loads(found)


def text_of(payload, index):
    lines, runs = payload["graphs"]["lines"], iter(payload["graphs"]["texts"][index])
    return "\n".join(line for first in runs for line in lines[first : first + next(runs)])


@pytest.fixture(scope="module")
def report():
    return make_report()


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("page") / "page.html", report)


def test_parent_folders_are_made_and_the_path_is_returned(report, tmp_path):
    path = tmp_path / "a" / "b" / "page.html"
    assert write_report(path, report) == path
    assert payload_of(path)["title"] == "sparda: LlamaForCausalLM"


def test_schedule_and_report_write_themselves(report, tmp_path):
    assert payload_of(report.to_html(str(tmp_path / "a.html")))["report"]["mode"] == "forecast"
    payload = payload_of(report.schedules[0].to_html(str(tmp_path / "b.html")))
    assert payload["report"] is None
    assert payload["graphs"] == {"lines": [], "texts": []}
    assert [schedule["phase"] for schedule in payload["schedules"]] == ["decode"]


def test_page_loads_nothing(page, elements_of):
    text = page.read_text(encoding="ascii")
    for tag, attributes in elements_of(text).tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not {"src", "srcset", "href", "xlink:href"} & set(attributes)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    assert "default-src 'none'" in text


def test_payload_equals_what_was_given(report, page):
    payload = payload_of(page)
    fields = payload["row_fields"]
    for schedule, plain in zip(report.schedules, payload["schedules"], strict=True):
        rows = tuple(ScheduleRow(**dict(zip(fields, row, strict=True))) for row in plain["rows"])
        assert rows == schedule.rows
        assert {**plain, "rows": None} == {**schedule.to_dict(), "rows": None}
    for summary, plain in zip(report.passes, payload["report"]["passes"], strict=True):
        assert text_of(payload, plain.pop("before")) == summary.before
        assert text_of(payload, plain.pop("after")) == summary.after
        del plain["changes"]
    expected = report.to_dict()
    del expected["schedules"]
    assert payload["report"] == json.loads(json.dumps(expected))


def test_changes_rebuild_the_text_after(report, page):
    for summary, plain in zip(report.passes, payload_of(page)["report"]["passes"], strict=True):
        lines, target = summary.before.split("\n"), summary.after.split("\n")
        for first, end, new_first, new_end in reversed(plain["changes"]):
            lines[first:end] = target[new_first:new_end]
        assert lines == target
        assert bool(plain["changes"]) == (summary.before != summary.after)


def test_each_graph_text_and_each_line_is_stored_once(report, page):
    graphs = payload_of(page)["graphs"]
    distinct = {text for summary in report.passes for text in (summary.before, summary.after)}
    assert len(graphs["texts"]) == len(distinct)
    assert len(graphs["lines"]) == len({line for text in distinct for line in text.split("\n")})


def test_page_of_a_large_model_is_small(tmp_path):
    report = make_report(180)
    assert len(report.schedules[0].rows) + len(report.schedules[1].rows) > 5000
    assert write_report(tmp_path / "page.html", report).stat().st_size < 2 << 20


def test_hostile_text_stays_text(tmp_path, elements_of):
    path = write_report(tmp_path / "page.html", make_hostile_report())
    text = path.read_text(encoding="ascii")
    assert "<b>" not in text
    assert text.count("</script>") == 2
    payload = payload_of(path)
    assert payload["report"]["error"] == HOSTILE
    assert payload["schedules"][0]["rows"][0][:2] == [HOSTILE, HOSTILE]
    assert text_of(payload, payload["report"]["passes"][0]["after"]) == f"a\n{HOSTILE}\n"
    assert elements_of(text).texts["title"] == [f"sparda: {HOSTILE}"]


def test_lone_surrogate_is_written(tmp_path):
    path = write_report(tmp_path / "page.html", make_report(1, model="\ud800"))
    assert payload_of(path)["report"]["model"] == "\ud800"


def test_number_that_json_cannot_hold_is_refused(tmp_path):
    schedule = dataclasses.replace(make_schedule(), baseline_us=float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        schedule.to_html(tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.fixture(scope="module")
def drawn(browse, page):
    return browse(page)


def taking_time(schedules):
    return [row for each in schedules for row in each.rows if row.end_us > row.start_us]


@pytest.mark.browser
def test_browser_draws_one_rectangle_per_row_that_takes_time(report, drawn):
    bars = drawn.having("bar")
    assert len(bars) == len(taking_time(report.schedules))
    assert len(bars) < sum(len(each.rows) for each in report.schedules)
    kinds = {name for bar in bars for name in bar["class"].split()} - {"bar", "odd"}
    assert kinds == {"linear", "sparda", "copy", "exposed", "other"}
    exposed = sum(row.exposed_us > 0 for row in taking_time(report.schedules))
    assert sum("exposed" in bar["class"] for bar in bars) == exposed > 0


@pytest.mark.browser
def test_browser_shows_the_report(report, drawn):
    for text in ("LlamaForCausalLM", "forecast", "131,072", "4.0 GiB", "208.3 MiB", "16.78 M"):
        assert text in drawn.texts["stats"][0]
    assert len(drawn.having("site-row")) == len(report.sites)
    assert len(drawn.having("bytes-row")) == len(report.layers)
    assert len(drawn.having("pass-row")) == len(report.passes)
    assert len(drawn.having("layers-decode-row")) == len(report.layers) + 2
    assert len(drawn.having("choice")) == sum(len(each.choices) for each in report.schedules)
    assert drawn.texts["dense-row"] == ["3window1sliding window"]
    assert drawn.having("error") == []
    assert "score_blocks_0" not in drawn.texts["diff-before"][0]
    assert "score_blocks_0" in drawn.texts["diff-after"][0]


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_browser_searches_for_the_fragment(report, browse, page, drawn, width):
    rows = taking_time(report.schedules)
    found = browse(page, "#q=%20Score_Blocks_1", width)
    assert sum("hit" in bar["class"].split() for bar in found.having("bar")) == 2
    assert all("hidden" in row for row in found.having("site-row"))
    assert not any("hidden" in row for row in drawn.having("site-row"))
    summary = f"2 of {len(rows)} nodes \u00b7 0 of 4 sites \u00b7 1 graph line"
    assert found.texts["found"] == [summary]
    assert found.texts["hits"] == ["0", "1", "1"] * 2
    assert found.texts["diff-place"] == ["1 matching line"]
    assert (drawn.num("mark"), found.num("mark")) == (0, 1)


@pytest.mark.browser
def test_browser_draws_no_more_lines_than_are_in_view(browse, tmp_path):
    before = "\n".join(f"%node_{i} = call_function[target=add]()" for i in range(3000))
    after = before.replace("%node_7 ", "%renamed ").replace("%node_2900 ", "%other ")
    summary = PassSummary("decode", "rename", {"renamed": 2}, 1.0, 3000, 3000, before, after)
    path = write_report(tmp_path / "page.html", make_report(1, passes=(summary,)))
    found = browse(path, "#q=target")
    assert 0 < len(found.having("line")) < 200
    assert "3,002 graph lines" in found.texts["found"][0]
    assert found.texts["hits"] == ["3,000"]


@pytest.mark.browser
def test_browser_shows_hostile_text_as_text(browse, tmp_path):
    shown = browse(write_report(tmp_path / "page.html", make_hostile_report()))
    assert shown.num("b") == 0
    for testid in ("error", "choice", "dense-row", "title"):
        assert HOSTILE in shown.texts[testid][0]


@pytest.mark.browser
def test_browser_shows_a_schedule_alone(browse, tmp_path):
    schedules = [make_schedule(), Schedule("prefill", "cpu", (), (), 0.0)]
    shown = browse(write_html(tmp_path / "page.html", title="t", schedules=schedules))
    assert len(shown.having("bar")) == len(taking_time(schedules))
    assert shown.having("timeline-prefill")
    assert not any(shown.having(name) for name in ("overview", "sites", "dense", "bytes", "passes"))


@pytest.mark.browser
def test_browser_shows_a_model_that_cannot_be_rewritten(browse, tmp_path):
    nothing = {"sites": (), "layers": (), "passes": (), "schedules": ()}
    path = write_report(tmp_path / "page.html", make_report(error="No attention.", **nothing))
    shown = browse(path)
    assert "No attention." in shown.texts["error"][0]
    assert shown.texts["dense-nothing"] == ["nothing"]


@pytest.mark.browser
def test_browser_answers_pointer_and_keys(report, browse, page, tmp_path):
    actions = """<script>
        const view = document.querySelector("[data-testid=timeline-decode]");
        const box = view.getBoundingClientRect();
        const at = { clientX: box.left + 2, clientY: box.top + 60, pointerType: "mouse" };
        view.dispatchEvent(new PointerEvent("pointermove", at));
        for (const key of ["ArrowRight", "ArrowRight", "+", "+"])
            view.dispatchEvent(new KeyboardEvent("keydown", { key }));
        document.getElementById("found").title = view.scrollWidth > 2 * box.width;
        findInGraph("wait_blocks_2", "decode");
    </script></body>"""
    played = tmp_path / "played.html"
    played.write_text(page.read_text(encoding="ascii").replace("</body>", actions))
    shown = browse(played)
    first, second = report.schedules[0].rows[:2]
    assert first.node in shown.texts["tip"][0]
    assert second.node in shown.texts["detail-decode"][0]
    assert shown.having("found")[0]["title"] == "true"
    assert [row.get("class") or "" for row in shown.having("pass-row")] == [""] * 5 + ["chosen"]
    assert shown.texts["diff-place"] == ["matching line 1 of 1"]


@pytest.mark.browser
def test_browser_shows_every_mode_of_a_demo_first(browse, report, tmp_path):
    demo = {
        "title": "t", "before": [HOSTILE], "columns": ["mode", "speed"], "num_text": 1,
        "rows": [["query", HOSTILE], ["exact", "3 ms"]], "wrong": [False, True], "notes": ["n"],
    }  # fmt: skip
    path = write_html(tmp_path / "p.html", title="t", schedules=[], report=report, demo=demo)
    shown = browse(path)
    assert shown.texts["demo-row"] == [f"query{HOSTILE}", "exact3 ms"]
    assert [row.get("class") or "" for row in shown.having("demo-row")] == ["", "wrong"]
    assert shown.num("b") == 0
    assert "the last mode, forecast." in shown.texts["demo"][0]
