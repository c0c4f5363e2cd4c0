from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.intervals import Estimate
from sparda_compile.evaluation.text.results import TextRow
from sparda_compile.evaluation.text.show import print_rows, write_text_plot


def row(case, **fields):
    plain = {
        "task": "perplexity", "length": 4096, "mode": "query", "selector": "infllm2", "hints": "",
        "prefill": "dense", "budget": 0.1, "num_samples": 3, "tokens": 192,
        "perplexity": Estimate(14.71, 11.5, 18.0), "ratio": Estimate(1.043, 1.021, 1.066),
        "kl": Estimate(0.058, 0.031, 0.085), "top1": Estimate(0.922, 0.881, 0.963),
        "right": None, "right_gain": None, "right_by_label": {},
    }  # fmt: skip
    return TextRow(**plain | {"case": case} | fields)


DENSE = row("dense", mode="dense", budget=1.0, selector="")
ROWS = [
    DENSE, row("query infllm2 10%"), row("query infllm2 25%", budget=0.25),
    row("oracle 10%", selector="oracle"), row("oracle 25%", selector="oracle", budget=0.25),
]  # fmt: skip


def printed(rows):
    out = io.StringIO()
    print_rows(rows, Console(file=out, width=110))
    return out.getvalue()


def test_a_table_of_texts():
    text = printed(ROWS)
    lines = {each.case: [x for x in text.splitlines() if each.case in x] for each in ROWS}
    lines = {name: found[0] for name, found in lines.items()}
    assert text.index("dense") < text.index("query infllm2 10%") < text.index("oracle 25%")
    line = lines["query infllm2 10%"]
    for shown in ("10%", "14.71", "1.043 [1.021, 1.066]", "0.058 [0.031, 0.085]"):
        assert shown in line
    assert "92.2 [88.1, 96.3]" in line
    assert "1.043" not in lines["dense"]
    assert "3 documents, 4096 tokens each, 192 predictions" in text
    assert "Answers" not in text


def test_one_document_has_no_interval():
    alone = Estimate(1.043, math.nan, math.nan)
    (line,) = (x for x in printed([row("query 9%", ratio=alone)]).splitlines() if "9%" in x)
    assert "1.043 " in line
    assert "nan" not in line


def test_a_table_of_answers():
    answers = {
        "task": "needle", "right": Estimate(0.9, 0.6, 0.98),
        "right_gain": Estimate(-0.1, -0.3, 0.1), "right_by_label": {"0%": 1.0, "50%": 0.8},
    }  # fmt: skip
    text = printed([row("query infllm2 10%", **answers)])
    assert "90.0 [60.0, 98.0]" in text
    assert "-10.0 [-30.0, 10.0]" in text
    assert "50%: 80" in text
    assert "documents" not in text


def test_a_plot_has_a_line_for_each_configuration(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig

    def savefig(figure, *args, **settings):
        drawn.append(figure)
        save(figure, *args, **settings)

    monkeypatch.setattr(Figure, "savefig", savefig)
    path = write_text_plot([*ROWS, row("query infllm2 10%", length=8192)], tmp_path / "text.svg")
    assert "<svg" in path.read_text()
    first, second = drawn[0].axes
    assert first.get_title() == "4096 tokens, 3 documents"
    lines = {line.get_label(): line.get_xdata() for line in first.get_lines()}
    assert [*lines] == ["dense", "query infllm2", "oracle"]
    assert list(lines["query infllm2"]) == [10.0, 25.0]
    assert len(second.get_lines()) == 1


def test_a_plot_of_answers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="add task perplexity"):
        write_text_plot([row("query", task="needle")], tmp_path / "text.svg")
    assert not (tmp_path / "text.svg").exists()
