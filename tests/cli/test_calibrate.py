from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from sparda_compile.bench import calibration
from sparda_compile.cli import labs
from sparda_compile.cli import main as cli
from sparda_compile.passes.machine import Machine, calibration_file, machine_for

MACHINE = Machine("Fake GPU 9000", 1000.0, 20.0, 100.0, 1.5, overlaps=True)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["calibrate", *arguments])


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Fake GPU 9000")
    monkeypatch.setattr(labs, "require_gpu", lambda command: None)
    monkeypatch.setattr(calibration, "measure_machine", lambda say: MACHINE)


def test_constants_are_written_for_later_plans(gpu):
    result = run("--commit", "abc123")
    assert result.exit_code == 0, result.output
    assert "Fake GPU 9000, measured" in result.stdout
    path = calibration_file("Fake GPU 9000")
    assert f"Wrote {path}" in result.stdout.replace("\n", "")
    assert json.loads(path.read_text())["environment"]["commit"] == "abc123"
    assert machine_for(None, torch.device("cuda")) == MACHINE


def test_print_only_writes_nothing(gpu, tmp_path):
    result = run("--print-only")
    assert result.exit_code == 0, result.output
    assert "20.00" in result.stdout
    assert "Wrote" not in result.stdout
    assert not list(tmp_path.iterdir())


def test_json(gpu):
    found = json.loads(run("--json").stdout)
    assert Machine(**found["machine"]) == MACHINE
    assert found["file"] == str(calibration_file("Fake GPU 9000"))
    assert json.loads(run("--json", "--print-only").stdout)["file"] is None


def test_folder_that_cannot_be_written(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = run()
    assert result.exit_code == 2
    assert "use --print-only" in " ".join(result.stderr.split())


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("--json")
    assert result.exit_code == 2
    assert "`sparda calibrate` measures a CUDA GPU" in " ".join(result.stderr.split())
    assert result.stdout == ""
