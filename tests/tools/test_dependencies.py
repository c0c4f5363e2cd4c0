from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "dependencies.py"
CHECK = runpy.run_path(str(SCRIPT))["broken_dependencies"]

PYPROJECT = """
[project]
name = "my-pkg"
dependencies = ["torch>=2.11", "py-yaml[fast]; python_version > '3'"]

[project.optional-dependencies]
plot = ["matplotlib"]
dev = ["pytest==9"]
docs = ["sphinx"]
"""
CLEAN = (
    "from __future__ import annotations\n"
    "import os.path, torch.nn\n"
    "import my_pkg.other\n"
    "from . import other\n"
    "if TYPE_CHECKING:\n    import numpy\n"
    "def draw():\n    try:\n        from matplotlib import pyplot\n    except ImportError:\n"
    "        import py_yaml.x as y\n"
)


def broken(folder, text):
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "my_pkg").mkdir(exist_ok=True)
    (folder / "my_pkg" / "a.py").write_text(text)
    return CHECK(folder / "pyproject.toml")


def test_clean_project(tmp_path):
    assert broken(tmp_path, CLEAN) == []


@pytest.mark.parametrize("name", ["torch.nn", "py_yaml.x", "matplotlib"])
def test_what_nothing_imports_is_named(tmp_path, name):
    module = name.partition(".")[0]
    found = broken(tmp_path, CLEAN.replace(name, "os"))
    assert found == [f"{module} is declared and not imported"]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import jinja2", "jinja2"),
        ("from numpy.linalg import svd", "numpy"),
        ("def f():\n    import pytest", "pytest"),
        ("if typing.TYPE_CHECKING:\n    import one\nelse:\n    import two", "two"),
    ],
)
def test_what_is_not_declared_is_named_with_its_place(tmp_path, line, name):
    text = CLEAN + line + "\n"
    number = text[: text.rindex(name)].count("\n") + 1
    assert broken(tmp_path, text) == [f"my_pkg/a.py:{number}: {name} is imported and not declared"]


def test_command_checks_this_project_and_another(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
        )

    assert (run().returncode, run().stdout) == (0, "")
    broken(tmp_path, CLEAN + "import numpy\n")
    other = run(str(tmp_path / "pyproject.toml"))
    assert (other.returncode, other.stdout.count("\n")) == (1, 1)
