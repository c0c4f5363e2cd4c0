from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("small_model_recipe", "train_small_model")

pytestmark = pytest.mark.usefixtures("no_deprecations")


@pytest.fixture
def script(monkeypatch):
    """The script, with the recipe beside it; its toy model looks things up in both layers."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("train_small_model")
    toy = dataclasses.replace(module.PRESETS["toy"], lookup_layers=(0, 1))
    monkeypatch.setitem(module.PRESETS, "toy", toy)
    yield module
    for name in NAMES:
        sys.modules.pop(name, None)


def hidden_in_steps(script, monkeypatch, out, *arguments):
    """Return what was hidden in each step, and the model after a few."""
    calls = []
    real = script.answer_logits

    def answer_logits(model, batch, positions, watch, config, hidden):
        assert config is not None
        calls.append((batch, hidden))
        return real(model, batch, positions, watch, config, hidden)

    monkeypatch.setattr(script, "answer_logits", answer_logits)
    args = script.parse([
        "--out", str(out), "--preset", "toy", "--device", "cpu", "--budget", "0.6",
        "--sparse-share", "1", *arguments,
    ])  # fmt: skip
    run = script.Run(args)
    for _ in range(3):
        run.train_step(run.preset.stages[-1], 0.0)
    monkeypatch.setattr(script, "answer_logits", real)
    return calls, run.model


def test_evidence_is_hidden_from_all_lookups_but_the_last(script, monkeypatch, tmp_path):
    calls, dropped = hidden_in_steps(script, monkeypatch, tmp_path, "--drop-evidence", "0.5")
    for batch, hidden in calls:
        assert list(hidden) == [0]
        asked = hidden[0][:, batch.answer_positions_A - 1 - batch.question_start]
        is_hidden = asked >= 0
        assert 0.2 < is_hidden.float().mean() < 0.8
        assert torch.equal(asked[is_hidden], batch.evidence_BA[is_hidden])
    _, kept = hidden_in_steps(script, monkeypatch, tmp_path)
    differs = [
        not torch.equal(a, b) for a, b in zip(dropped.parameters(), kept.parameters(), strict=True)
    ]
    assert any(differs)


def test_nothing_is_hidden_or_drawn_without_the_option(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "hidden_evidence", None)
    calls, one = hidden_in_steps(script, monkeypatch, tmp_path)
    assert all(hidden == {} for _, hidden in calls)
    _, other = hidden_in_steps(script, monkeypatch, tmp_path, "--drop-evidence", "0")
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_model_with_one_lookup_layer_has_nothing_to_drop(script, monkeypatch, capsys):
    one = dataclasses.replace(script.PRESETS["toy"], lookup_layers=(1,))
    monkeypatch.setitem(script.PRESETS, "toy", one)
    with pytest.raises(SystemExit):
        script.parse(["--out", "x", "--preset", "toy", "--drop-evidence", "0.3"])
    assert "one lookup layer" in capsys.readouterr().err
