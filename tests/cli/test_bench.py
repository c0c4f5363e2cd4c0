from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from sparda_compile.bench.suite import PARTS, WITH_BASELINES
from sparda_compile.cli import main as cli

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


def words(text):
    return " ".join(text.replace("\u2502", " ").split())


def test_budget(asked, tmp_path):
    result = run("budget", "--gib", 8, "--gib", 4, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert [entry[2] for entry in asked[1:]] == [8.0, 4.0]
    assert asked[1][1].overlaps == (0.9,)
    found = json.loads((tmp_path / "budget-8b.json").read_text())
    assert [r["budget_gib"] for r in found["results"]] == [4.0, 8.0]
    assert "limited by" in result.stdout


@pytest.fixture
def kernels(monkeypatch):
    found = {
        "copy": {"gbps": 4000.0},
        "gather": {
            "memcpy": {"median": 1.0, "low": 1.0, "high": 1.0, "runs": 3, "gbps": 50.0},
            "by_programs": {},
        },
        "prompt": {"tokens": 64, "past": 512, "kernels": {}, "others": {}},
        "beside": {},
    }
    module = pytest.importorskip("sparda_compile.bench.kernels")
    monkeypatch.setattr(module, "bench_kernels", lambda say: found)
    return found


def test_kernels(asked, kernels, tmp_path):
    result = run("kernels", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "Device copy: 4000 GB/s" in result.stdout
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["results"][0]["copy"] == kernels["copy"]


def test_all_runs_in_order_goes_on_after_a_failure_and_keeps_what_is_there(
    asked, kernels, tmp_path
):
    result = run("all", "--out", tmp_path, "--minutes", 600, "--json")
    assert result.exit_code == 1
    assert "decode 8b batch 8 failed; see above" in words(result.stderr)
    assert "RuntimeError: CUDA error" in result.stderr
    parts = json.loads(result.stdout)["parts"]
    words_of = {"decode": "batch {}", "prefill": "{} tokens", "turns": "behind {} tokens"}
    names = [f"{what} {shape} {words_of[what].format(size)}" for what, shape, size, _ in PARTS]
    assert [part["name"] for part in parts] == [
        "kernels", "prr", *names, "budget 8 GiB", "budget 16 GiB",
    ]  # fmt: skip
    assert {part["status"] for part in parts} == {"done", "failed", "kept"}
    measured = [entry for entry in asked if len(entry) == 3][:-2]
    for (name, setting, how), (what, shape, size, _) in zip(measured, PARTS, strict=True):
        assert name == shape
        if what == "decode":
            assert (setting.batch_size, how) == (size, (shape, size) == WITH_BASELINES)
        else:
            assert (setting.tokens if what == "prefill" else setting.past, how) == ((size,), what)
    # One model at a time: that of 8b is made again for the budget.
    assert [entry[0] for entry in asked if len(entry) == 2] == ["8b", "8b-8kv", "8b"]
    assert json.loads((tmp_path / "all.json").read_text())["parts"] == parts
    asked.clear()
    again = json.loads(run("all", "--out", tmp_path, "--json").stdout)["parts"]
    assert [p["name"] for p in again if p["status"] != "kept"] == ["decode 8b batch 8"]


def test_all_stops_in_time(asked, kernels, monkeypatch, tmp_path):
    monkeypatch.setattr("sparda_compile.cli.bench._KERNEL_MINUTES", 2.0)  # less than all others
    result = run("all", "--out", tmp_path, "--minutes", 2.5)
    assert result.exit_code == 0, result.output
    assert asked == []
    assert "kernels done" in words(result.stdout)
    assert "decode 8b batch 1 left out" in words(result.stdout)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["decode", "--shape", "70b"], "not one of '8b', '8b-8kv', 'tiny'"),
        (["decode", "--tokens", 1000], "multiple of 64 from 10176 on"),
        (["decode", "--tokens", 10300], "multiple of 64 from 10176 on"),
        (["decode", "--variant", "inline"], "add --variant scheduled"),
        (["decode", "--variant", "scheduled", "--variant", "fast"], "not one of 'scheduled'"),
        (["decode", "--overlap", 2], "less than or equal to 1"),
        (["decode", "--steps", 93], "use 1 to 92"),
        (["decode", "--batch", 0], "greater than or equal to 1"),
        (["compile", "--shape", "70b"], "not one of '8b', '8b-8kv', 'tiny'"),
        (["compile", "--variant", "fast"], "not one of 'scheduled'"),
        (["budget", "--gib", 0], "use more than 0"),
        (["budget", "--shape", "70b"], "not one of '8b'"),
    ],
)
def test_wrong_usage(asked, arguments, expected):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert expected in words(result.stderr)
    assert asked == []


def test_plot_without_matplotlib_is_refused_before_anything_runs(asked, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("decode", "--plot", tmp_path / "x.png")
    assert result.exit_code == 1
    assert "sparda-compile[plot]" in words(result.stderr)
    assert asked == []


@needs_no_gpu
@pytest.mark.parametrize("command", ["decode", "budget", "kernels", "all"])
def test_no_gpu(command, tmp_path):
    result = run(command, "--out", tmp_path)
    assert result.exit_code == 2
    assert f"`sparda bench {command}` measures a CUDA GPU" in words(result.stderr)
    assert not list(tmp_path.iterdir())
