from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from sparda_compile.cli.train_lines import TrainingLines
from sparda_compile.cli.train_show import show_training
from sparda_compile.forecast.projection import Projection
from sparda_compile.forecast.weights import ForecastWeights
from sparda_compile.training.report import HeldOutReport, StepReport


@pytest.fixture
def shown(capsys, tmp_path, monkeypatch):
    """Shows two steps and a measurement; returns what was printed."""
    lines = TrainingLines(1)
    lines.reports = [
        StepReport(n, {0: 1.0 / n}, {0: math.nan}, 0.5, 200, seconds)
        for n, seconds in ((1, 8.0), (2, 2.0))
    ]
    lines.measures = [HeldOutReport(n, {0: 0.5}, {0: 0.25 * n}, 100) for n in (1, 2)]
    weights = ForecastWeights({0: Projection((torch.ones(2, 2),))}, SimpleNamespace(to_json="{}"))
    weights.info.to_json = lambda: "{}"

    def run(rank="0", **settings):
        monkeypatch.setenv("RANK", rank)
        capsys.readouterr()
        show_training(tmp_path / "out", weights, lines, [], 2, **settings)
        return capsys.readouterr().out

    return run


def test_summary_has_the_rate_of_warm_steps(shown):
    text = shown(as_json=False)
    assert "loss 1.0000 -> 0.5000, recall unknown (too short)" in text
    assert "100 tokens/s" in text
    assert "held-out documents: loss 0.5000 -> 0.5000, recall 0.250 -> 0.500" in text


def test_json_has_the_rate_of_each_step_and_of_warm_ones(shown, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    said = json.loads(shown(as_json=True))
    assert (said["processes"], said["tp"], said["tokens_per_s"]) == (4, 2, 100.0)
    assert [each["tokens_per_s"] for each in said["steps"]] == [25.0, 100.0]
    assert said["steps"][0]["recall"] is None
    assert [each["recall"] for each in said["held_out"]] == [0.25, 0.5]


@pytest.mark.parametrize("as_json", [False, True])
def test_other_processes_print_nothing(shown, as_json):
    assert shown("1", as_json=as_json) == ""
