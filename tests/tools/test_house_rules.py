from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "house_rules.py"
RULES = runpy.run_path(str(SCRIPT))

CLEAN = {
    "__init__.py": '__all__ = ["__version__"]\n__version__ = "1"\n',
    "a/__init__.py": "",
    "a/b.py": '__all__ = ["Open"]\n\nclass Open:\n    _mine = 1\n\ndef _hidden(): ...\n',
    "a/c.py": (
        "import torch\nimport pkg.a.b\nimport pkg.a.b as d\nfrom pkg import __version__\n"
        "from pkg.a import b\nfrom pkg.a.b import Open\nfrom torch import _C\n"
        "torch._dynamo\nOpen()._mine\nb.Open()._mine\nb.__doc__\nd.Open\npkg.a.b.Open\n"
    ),
}


def lines_of(num_lines, docstring=0):
    """Return a function of so many lines, with a docstring of so many more."""
    words = ['    """Say\n', *["    so.\n"] * (docstring - 2), '    """\n'] if docstring else []
    return "".join(["def long():\n", *words, *["    0\n"] * (num_lines - 1)])


def broken(tmp_path, files, exceptions=()):
    """Return what is broken in the clean tree with other files."""
    for path, text in {**CLEAN, **files}.items():
        file = tmp_path / "pkg" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return RULES["broken_rules"](tmp_path / "pkg", dict.fromkeys(exceptions, "why not"))


def test_clean_tree_breaks_no_rule(tmp_path):
    assert broken(tmp_path, {}) == []


@pytest.mark.parametrize(("path", "most"), [("a/new.py", 400), ("passes/x/new.py", 250)])
def test_length_of_a_file(tmp_path, path, most):
    assert broken(tmp_path, {path: "0\n" * most}) == []
    found = broken(tmp_path, {path: "0\n" * (most + 1)})
    assert found == [f"pkg/{path}:1: the file has {most + 1} lines, more than {most}"]


@pytest.mark.parametrize("path", ["a/new.py", "kernels/new.py"])
def test_the_formatter_is_kept_off_by_kernels_alone(tmp_path, path):
    line = "x = [1,2]  # fmt: skip\n"
    found = broken(tmp_path, {path: "\n" + line})
    assert found == [f"pkg/{path}:2: keeps the formatter off; let it format the line"]
    assert broken(tmp_path, {path: "", "kernels/gpu/new.py": line, "a/new_kernel.py": line}) == []


def test_length_of_a_function_is_without_its_docstring(tmp_path):
    assert broken(tmp_path, {"new.py": "@deco\n" + lines_of(60, docstring=9)}) == []
    found = broken(tmp_path, {"new.py": lines_of(61, docstring=9)})
    assert found == ["pkg/new.py:1: long has 61 lines, more than 60"]


def test_long_method_goes_by_the_name_of_its_class(tmp_path):
    method = "class A:\n" + "".join(
        f"    {line}" for line in lines_of(61).splitlines(keepends=True)
    )
    assert broken(tmp_path, {"new.py": method}) == [
        "pkg/new.py:2: A.long has 61 lines, more than 60"
    ]
    assert broken(tmp_path, {"new.py": method}, ["new.py:A.long"]) == []


@pytest.mark.parametrize("text", ["", lines_of(60)])
def test_exception_that_nothing_needs_is_an_error(tmp_path, text):
    found = broken(tmp_path, {"new.py": text}, ["new.py:long"])
    assert found == ["new.py:long is an exception that nothing needs"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("from pkg.a.b import Open, torch", "torch is private to pkg.a.b: not in its __all__"),
        ("def f():\n    from pkg.a.b import _hidden as h",
         "_hidden is private to pkg.a.b: not in its __all__"),
        ("from pkg.a.b import *", "* is private to pkg.a.b: not in its __all__"),
        ("from pkg.a import gone", "gone is private to pkg.a: not in its __all__"),
        ("from pkg.a import _part", "_part is private to pkg.a: not in its __all__"),
        ("from pkg.a import b\nb._hidden()", "_hidden is private to pkg.a.b"),
        ("from pkg.a import b as c\nc._hidden", "_hidden is private to pkg.a.b"),
        ("import pkg.a.b\npkg.a.b._hidden", "_hidden is private to pkg.a.b"),
        ("import pkg.a.b as c\nc._hidden", "_hidden is private to pkg.a.b"),
    ],
)  # fmt: skip
def test_private_is_private(tmp_path, code, words):
    found = broken(tmp_path, {"a/_part.py": "", "new.py": code})
    assert found == [f"pkg/new.py:{code.count(chr(10)) + 1}: {words}"]


@pytest.mark.parametrize("header", ["__all__: list[str] = ['x']", "__all__ = ('x',)"])
def test_names_are_open_however_they_are_listed(tmp_path, header):
    assert broken(tmp_path, {"new.py": header, "user.py": "from pkg.new import x"}) == []


def test_script_prints_a_line_for_each_and_fails(tmp_path):
    broken(tmp_path, {"new.py": "from pkg.a.b import x, y"})
    command = [sys.executable, SCRIPT, tmp_path / "pkg"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    assert len(run.stdout.splitlines()) == 2


def test_package_keeps_the_rules():
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr
