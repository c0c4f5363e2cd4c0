from __future__ import annotations

import dataclasses
import io
import json
import sys

import pytest
import torch
from rich.console import Console

from sparda_compile.environment import write_result
from sparda_compile.errors import BackendUnavailableError
from sparda_compile.evaluation.guesses import Guess
from sparda_compile.evaluation.run import Evaluation, EvaluationRow, Recall
from sparda_compile.evaluation.show import print_evaluation, write_plot

NAN = float("nan")


def recall(name, layer, mass):
    return Recall(
        name=name, layer=layer, mass=mass, mass_low=mass - 0.1, mass_high=mass + 0.1, blocks=0.5,
        blocks_low=0.4, blocks_high=0.6,
    )  # fmt: skip


ROW = EvaluationRow(
    name="query 10%", mode="query", selector="infllm2", task="multi_key", length=4096, budget=0.1,
    num_blocks=64, num_samples=20, num_right=19, accuracy=0.95, low=0.764, high=0.991, kl=0.125,
    agreement=0.9,
    recalls=(recall("query", None, 0.8), recall("query", 0, 0.7), recall("oracle", None, NAN)),
)  # fmt: skip
DENSE = dataclasses.replace(ROW, name="dense", mode="dense", budget=1.0, recalls=())
EVALUATION = Evaluation("LlamaForCausalLM", 0, (DENSE, ROW))


def printed(evaluation):
    console = Console(width=120, file=io.StringIO())
    print_evaluation(evaluation, console)
    return console.file.getvalue()


def test_table():
    lines = printed(EVALUATION).splitlines()
    row = next(line for line in lines if "query 10%" in line)
    assert row.split() == [
        "query", "10%", "multi_key", "4096", "10%", "95.0%", "[76.4,", "99.1]", "0.125", "90.0%",
    ]  # fmt: skip
    who = next(line for line in lines if "[70.0, 90.0]" in line)
    assert "80.0%" in who
    assert "50.0% [40.0, 60.0]" in who
    oracle = next(line for line in lines if "oracle" in line and "multi_key" in line)
    assert " - " in oracle


def test_guesses():
    assert "Who guessed" not in printed(EVALUATION)
    guesses = [
        Guess(name="ema", layer=layer, budget=1.25, coverage=found, precision=share, fetched=0.25)
        for layer, found, share in ((None, 0.9, NAN), (0, 0.8, 0.125), (1, 0.7, 0.5), (2, NAN, 0.5))
    ]
    guesses.append(dataclasses.replace(guesses[0], name="mixed"))
    text = printed(Evaluation("Model", 0, (DENSE, dataclasses.replace(ROW, guesses=guesses))))
    rows = [line.split() for line in text.partition("Who guessed")[2].splitlines()]
    head = ["query", "10%", "multi_key", "4096"]
    assert [*head, "ema", "1.25x", "90.0%", "-", "25.0%", "70.0%", "(1)"] in rows
    assert [*head, "mixed", "1.25x", "90.0%", "-", "25.0%", "-"] in rows
    assert not any("12.5%" in row for row in rows)


def test_no_recall_table_without_recalls():
    assert "Who found" not in printed(Evaluation("Model", 0, (DENSE,)))


def test_json(tmp_path):
    path = tmp_path / "found.json"
    write_result(path, EVALUATION.to_dict())
    plain = json.loads(path.read_text())
    assert plain["environment"]["torch"] == torch.__version__
    assert plain["rows"][1]["accuracy"] == 0.95
    assert plain["rows"][1]["recalls"][2]["mass"] is None


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = write_plot(EVALUATION, tmp_path / "found.svg")
    text = path.read_text()
    assert "<svg" in text


def test_plot_needs_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailableError, match=r"sparda-compile\[plot\]"):
        write_plot(EVALUATION, tmp_path / "found.png")
    assert not (tmp_path / "found.png").exists()
