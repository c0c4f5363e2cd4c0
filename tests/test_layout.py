"""The house rules that no tool checks: where things are, how big, and what they may not do."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sparda_compile"
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py"))
MAX_LINES = 400

# Public modules that need no test file of their own, and why.
UNMIRRORED = {
    "sparda_compile/errors.py": "classes without behavior; each is raised in the tests of its user",
}

# Files on the path of a decode step: a copy to the host would stall it.
STEP_FOLDERS = ("runtime", "kernels", "selectors")
HOST_SYNCS = ("item", "cpu", "nonzero")
HOST_SYNC_REASON = re.compile(r"# host-sync: \S")

LAZY = ("torch._dynamo", "torch._inductor", "transformers", "networkx", "rich")
HOME_PATH = re.compile(r"(?<![\w.)}])/(?:home|Users|root|work(?:space)?)/|[A-Z]:\\Users\\")
# What git leaves in a file that two branches changed.
CONFLICT = re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE)
# Spelled so that this file does not hold what it forbids.
REGISTRY = re.compile(
    r"py[p]i\.(?:org|io)|python[h]osted\.org|download\.py[t]orch\.org"
    r"|an[a]conda\.(?:org|com)|np[m]js\.(?:org|com)|crates\.[i]o|proxy\.go[l]ang\.org"
)


@cache
def source(module):
    return (ROOT / module).read_text(encoding="utf-8")


@cache
def tree(module):
    return ast.parse(source(module), filename=module)


def is_public(module):
    return not Path(module).name.startswith("_")


def mirror(module):
    """Return the test file of a module: x/y.py of the package has tests/x/test_y.py."""
    path = Path(module).relative_to("sparda_compile")
    return ROOT / "tests" / path.with_name(f"test_{path.name}")


def calls(module, names):
    """Yield each call of a function or method that goes by one of the names."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in names:
                yield node


@pytest.mark.parametrize("module", [module for module in MODULES if is_public(module)])
def test_public_module_has_mirrored_test_file(module):
    test_file = mirror(module)
    if module in UNMIRRORED:
        assert not test_file.exists(), f"{module} has its tests now: drop it from UNMIRRORED"
    else:
        assert test_file.exists(), f"write {test_file.relative_to(ROOT)}"


def test_unmirrored_modules_exist():
    assert set(UNMIRRORED) <= set(MODULES)


@pytest.mark.parametrize("folder", ["tests", "tools", "benchmarks", "examples"])
def test_python_files_are_short(folder):
    lengths = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_prints(module):
    if module == "sparda_compile/cli/main.py":
        return
    prints = [call.lineno for call in calls(module, {"print"}) if isinstance(call.func, ast.Name)]
    assert not prints, f"{module} prints in lines {prints}; use logging"


@pytest.mark.parametrize(
    "module", [module for module in MODULES if module.split("/")[1] in STEP_FOLDERS]
)
def test_step_does_not_wait_for_the_device(module):
    lines = source(module).splitlines()
    waits = [
        call.lineno
        for call in calls(module, HOST_SYNCS)
        if not any(map(HOST_SYNC_REASON.search, lines[call.lineno - 1 : call.end_lineno]))
    ]
    assert not waits, f"{module} waits in lines {waits}; add `# host-sync: <reason>` if it must"


@pytest.mark.parametrize(
    "module", [module for module in MODULES if not Path(module).name.startswith("__")]
)
def test_module_declares_its_names_and_defers_annotations(module):
    body = tree(module).body
    futures = {
        alias.name
        for node in body
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
        for alias in node.names
    }
    assert "annotations" in futures, f"{module} lacks `from __future__ import annotations`"
    targets = [
        target
        for node in body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    assert any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets), (
        f"{module} lacks __all__"
    )


# In a process that has only what others wrote, a child for each name imports it first.
IMPORT_EACH = """
import importlib, os, sys, traceback
import networkx, torch, transformers
import transformers.cache_utils, transformers.generation.utils, transformers.modeling_utils
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(name)
"""


def test_every_part_can_be_imported_first():
    """Parts that import each other must not depend on which of them comes first."""
    modules = {"training.trainer", "hints.forecast", *(path.stem for path in PACKAGE.glob("*.py"))}
    modules |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    parts = [f"sparda_compile.{name}" for name in sorted(modules) if not name.startswith("_")]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_EACH, *parts],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]


def test_import_is_lean():
    code = (
        "import json, sys, sparda_compile, torch\n"
        f"loaded = [name for name in {LAZY!r} if name in sys.modules]\n"
        "print(json.dumps([loaded, torch.cuda.is_initialized()]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [[], False]


def tracked_text():
    """Yield the path and text of each file that git tracks, or would if it were added."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip(
            "checks the files that git lists, and here is no git or no checkout, as in an unpacked "
            "archive: what was written here by an environment or a cache, which may well name this "
            "machine, cannot be told from the project's files. A clone runs it"
        )
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    for name in listing.decode().split("\0"):
        path = ROOT / name
        if not name or path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        if b"\0" not in content:
            yield name, content.decode("utf-8", errors="replace")


def test_files_name_no_machine():
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in tracked_text()
        for number, line in enumerate(text.splitlines(), start=1)
        if HOME_PATH.search(line) or REGISTRY.search(line)
    ]
    assert not found, "\n".join(found)


def test_no_file_has_two_versions_of_a_line():
    assert [name for name, text in tracked_text() if CONFLICT.search(text)] == []
