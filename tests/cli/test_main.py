from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from sparda_compile import __version__

ROOT = Path(__file__).resolve().parents[2]


def test_version(sparda):
    result = sparda("version")
    assert result.exit_code == 0
    version = torch.__version__.split("+")[0]
    assert any(line.startswith(f"torch {version}") for line in result.stdout.splitlines())


def test_version_as_json(sparda):
    versions = json.loads(sparda("version", "--json").stdout)
    assert list(versions) == ["sparda_compile", "torch", "transformers", "python"]


def test_runs_as_a_module():
    command = [sys.executable, "-m", "sparda_compile", "version", "--json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_version_as_an_option(sparda):
    result = sparda("--version")
    assert (result.exit_code, result.stdout) == (0, f"sparda {__version__}\n")
