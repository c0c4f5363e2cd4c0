"""The Makefile says what it installs, once, and nothing when there is nothing to install."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Makes an environment whose pip and python only note that they were called.
PYTHON = """#!/bin/sh
mkdir -p .venv/bin
for name in pip python; do
  printf '#!/bin/sh\\necho "%s $*" >>calls\\n' $name >.venv/bin/$name
  chmod +x .venv/bin/$name
done
"""


@pytest.fixture
def project(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make_demo(project):
    command = ["make", "demo", "PYTHON=./python", "TORCH=9.9"]
    # What a make around this one says of itself would be heard here.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=True)


def test_first_demo_says_what_is_installed_and_later_ones_say_nothing(project):
    first = make_demo(project)
    assert first.stderr.splitlines() == [
        "make: making .venv with ./python (1 of 3)",
        "make: installing torch 9.9 and what it needs (2 of 3)",
        "make: installing transformers and the tools (3 of 3)",
        "make: .venv is ready",
    ]
    assert first.stdout == ""
    calls = (project / "calls").read_text().splitlines()
    assert [call.split()[:2] for call in calls] == [
        ["pip", "install"], ["pip", "install"], ["pip", "install"], ["python", "-m"]
    ]  # fmt: skip
    again = make_demo(project)
    assert (again.stdout, again.stderr) == ("", "")


def test_failed_installation_says_so_and_is_tried_again(project):
    (project / "python").write_text(PYTHON.replace('echo "%s', 'exit 1; echo "%s'))
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError) as caught:
            make_demo(project)
        assert "installing torch" in caught.value.stderr
        assert "is ready" not in caught.value.stderr
