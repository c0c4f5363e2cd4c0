"""The reference in docs/api: what it names is there, and docstrings say what signatures do.

`make docs` builds it with Sphinx; what is checked here needs no Sphinx.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import sparda_compile
from sparda_compile import errors

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "docs" / "api"
PAGES = {path.stem: path.read_text(encoding="ascii") for path in sorted(API.glob("*.rst"))}
MODULES = sorted(re.findall(r"^\.\. automodule:: (\S+)$", "\n".join(PAGES.values()), re.MULTILINE))
FUNCTIONS = re.findall(r"^\.\. autofunction:: (\S+)$", "\n".join(PAGES.values()), re.MULTILINE)
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$", re.MULTILINE)


def own(module):
    """Return the public functions and classes that a module defines itself."""
    named = {name: getattr(module, name) for name in module.__all__}
    return {
        name: value for name, value in named.items()
        if (inspect.isfunction(value) or inspect.isclass(value))
    }  # fmt: skip


def functions():
    """Yield the name and function of all public functions and methods of the reference."""
    for name in MODULES:
        for attribute, value in own(importlib.import_module(name)).items():
            if inspect.isfunction(value):
                yield f"{name}.{attribute}", value
                continue
            for method, found in vars(value).items():
                found = getattr(found, "__func__", found)
                if (
                    inspect.isfunction(found)
                    and not method.startswith("_")
                    and "<" not in (found.__qualname__)
                ):
                    yield f"{name}.{attribute}.{method}", found
    for name in FUNCTIONS:
        yield name, getattr(sparda_compile, name.rpartition(".")[2])


def sections(text):
    """Return the sections of a docstring in Google style, by name."""
    parts = SECTION.split(inspect.cleandoc(text))
    return dict(zip(parts[1::2], map(textwrap.dedent, parts[2::2]), strict=True))


def entries(section):
    """Return the names that a section explains, in order."""
    return re.findall(r"^\*{0,2}([\w.]+)(?: \([^)]*\))?:", section.strip("\n"), re.MULTILINE)


def test_each_page_is_in_the_table_of_contents():
    assert set(re.findall(r"^   (\w+)$", PAGES["index"], re.MULTILINE)) == set(PAGES) - {"index"}


def test_all_that_the_package_exports_has_an_entry():
    at_home = {f"sparda_compile.{name}" for name in sparda_compile.__all__}
    entered = {*FUNCTIONS, "sparda_compile.__version__"}
    for module in ("sparda_compile.config", "sparda_compile.errors"):
        assert module in MODULES
        entered |= {f"sparda_compile.{n}" for n in importlib.import_module(module).__all__}
    assert at_home <= entered


def test_what_the_guides_import_has_an_entry():
    guides = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    named = set()
    for guide in guides:
        named |= set(re.findall(r"from (sparda_compile\.[\w.]+) import", guide.read_text()))
        named |= set(re.findall(r"# of (sparda_compile\.[\w.]+?)\.?$", guide.read_text(), re.M))
    assert len(named) > 5
    assert named <= set(MODULES) | {"sparda_compile.evaluation.vocabulary"}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_and_what_it_has_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for attribute, value in own(module).items():
        assert inspect.getdoc(value), attribute


@pytest.mark.parametrize(("name", "function"), [pytest.param(*f, id=f[0]) for f in functions()])
def test_docstring_says_what_the_signature_does(name, function):
    text = function.__doc__
    assert text, "no docstring"
    found = sections(text)
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters if p not in ("self", "cls")]
    if "Args" in found:
        assert [e for e in entries(found["Args"]) if e in parameters] == entries(found["Args"])
        assert set(entries(found["Args"])) == set(parameters)
        if signature.return_annotation not in (None, "None", "Iterator[None]"):
            first = text.strip().split(maxsplit=1)[0]
            assert {"Returns", "Yields"} & set(found) or first in ("Return", "Yield", "Whether")
    if signature.return_annotation in (None, "None"):
        assert "Returns" not in found
    for error in entries(found.get("Raises", "")):
        assert hasattr(errors, error) or hasattr(builtins, error), error


def raised(function):
    """Return the errors of ours that a function's own lines raise by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    names = {c.func.id for c in calls if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)}
    return names & set(errors.__all__)


@pytest.mark.parametrize(("name", "function"), [pytest.param(*f, id=f[0]) for f in functions()])
def test_docstring_names_what_the_function_raises(name, function):
    assert raised(function) <= set(entries(sections(function.__doc__).get("Raises", "")))
