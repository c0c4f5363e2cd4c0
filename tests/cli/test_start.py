"""`sparda bench start`: what it refuses, and one real process from end to end."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from sparda_compile import environment
from sparda_compile.bench import start
from sparda_compile.bench.start import DEFAULT_SCENARIOS, Run
from sparda_compile.bench.start_child import TOKENS, Scenario
from sparda_compile.cli import main as cli
from sparda_compile.cli.start import _job

SMALL = ("--shape", "tiny", "--layers", 1, "--device", "cpu", "--lowering", "eager")


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", "start", *map(str, arguments)])


def words(text):
    return " ".join(text.replace("\u2502", " ").split())


@pytest.fixture(autouse=True)
def _no_git(monkeypatch):
    monkeypatch.setattr(environment, "_commit", lambda: "abc123")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--shape", "70b"), "'70b' is not one of '8b', '8b-8kv', 'tiny'"),
        (("--device", "tpu"), "'tpu' is not one of 'cuda', 'cpu'"),
        (("--mode", "forcast"), "'forcast' is not one of 'dense'"),
        (("--lowering", "aot"), "'aot' is not one of 'inductor', 'eager'"),
        (("--scenario", "4"), "--scenario 4 is not known"),
        (("--scenario", "1x9", "--scenario", "0x9"), "--scenario 0x9 is empty"),
        (("--layers", 0), "--layers"),
        (("--timeout", 0), "--timeout"),
    ],
)
def test_wrong_usage(tmp_path, arguments, expected):
    result = run("--out", tmp_path / "new", *arguments)
    assert result.exit_code == 2, result.output
    assert expected in words(result.stderr)
    assert not (tmp_path / "new").exists()


def test_no_gpu_is_wrong_usage(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("--device", "cuda")
    assert result.exit_code == 2
    assert "--device cuda is not there" in words(result.stderr)


@pytest.mark.parametrize(("has_gpu", "device"), [(True, "cuda"), (False, "cpu")])
def test_defaults(monkeypatch, has_gpu, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("sparda_compile.cli.start.find_device", torch.device)
    job = _job("8b", None, None, None, "forecast", "inductor")
    assert (job.device, job.num_layers, job.scenarios) == (device, 32, DEFAULT_SCENARIOS[device])
    assert _job("tiny", None, None, None, "query", "eager").num_layers == 32
    assert _job("tiny", 2, None, ["1x9"], "query", "eager").scenarios == ("1x9",)


@pytest.mark.parametrize("device", DEFAULT_SCENARIOS)
def test_default_scenarios_can_be_read(device):
    texts = DEFAULT_SCENARIOS[device]
    assert [str(Scenario.parse(text)) for text in texts] == list(texts)


@pytest.mark.slow
def test_one_real_process(monkeypatch, tmp_path):
    """A fresh process of the quickest program; tests/bench/test_start_child.py runs the others."""
    monkeypatch.setattr(start, "plan_runs", lambda *args, **more: (Run("dynamic", "cold"),))
    result = run(*SMALL, "--mode", "query", "--scenario", "2x33", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "start-cpu-tiny.json").read_text())
    assert found["environment"]["commit"] == "abc123"
    head = ("name", "shape", "num_layers", "device", "mode", "lowering", "dtype", "scenarios")
    assert tuple(found[name] for name in head) == (
        "start", "tiny", 1, "cpu", "query", "eager", "float32", ["2x33"],
    )  # fmt: skip
    (row,) = found["results"]
    assert (row["run"], row["program"], row["cache"]) == ("dynamic cold", "dynamic", "cold")
    assert "failed" not in row
    assert "unfinished" not in row
    assert list(row["import_s"]) == ["python", "torch", "transformers"]
    assert min(row["import_s"].values()) > 0
    (scenario,) = row["scenarios"]
    assert tuple(scenario["first_use"]["token_s"]) == TOKENS
    assert set(scenario["beyond_s"]) == {*TOKENS, "total"}
    assert "2x33 first" in words(result.stdout)
    assert "start-cpu-tiny.json" in result.stdout


@pytest.fixture
def failing(monkeypatch):
    code = "raise SystemExit('out of [luck]')"
    monkeypatch.setattr(start, "_command", lambda job, found: [sys.executable, "-c", code])
    monkeypatch.setattr(start, "_LOOK_S", 0.01)


def test_failures_are_shown_written_and_the_exit_code(failing, tmp_path):
    result = run(*SMALL, "--out", tmp_path)
    assert result.exit_code == 1
    assert "sparda cold failed: ended with code 1 out of [luck]" in words(result.stdout)
    assert "sparda warm failed: left out" in words(result.stdout)
    assert "sparda cold, sparda warm, dynamic cold, static cold failed; what" in words(
        result.stderr
    )
    found = json.loads((tmp_path / "start-cpu-tiny.json").read_text())
    assert all(row["failed"] for row in found["results"])
    assert len(found["results"]) == 4


def test_json_without_baselines(failing, tmp_path):
    result = run(*SMALL, "--out", tmp_path, "--json", "--no-baseline", "--commit", "1a2b")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [row["run"] for row in found["results"]] == ["sparda cold", "sparda warm"]
    text = (tmp_path / "start-cpu-tiny.json").read_text()
    assert json.loads(text)["environment"]["commit"] == "1a2b"
