"""The public surface of `sparda_compile.testing`; each module's own tests are in `testing/`."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparda_compile import testing

MODULES = sorted(Path(testing.__file__).parent.glob("*.py"))


def test_every_public_name_is_there():
    assert all(hasattr(testing, name) for name in testing.__all__)


def test_importing_it_leaves_transformers_alone():
    code = (
        "import json, sys, sparda_compile.testing\n"
        "print(json.dumps([n for n in ('transformers', 'torch._dynamo') if n in sys.modules]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_it_is_written_without_the_library(path):
    imported = {
        node.module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    }
    own = {name for name in imported if name.startswith("sparda_compile")}
    assert all(name.startswith("sparda_compile.testing") for name in own)
