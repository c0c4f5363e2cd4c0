from __future__ import annotations

import pytest
from typer.testing import CliRunner

from sparda_compile.cli import main as cli


@pytest.fixture(autouse=True)
def _width_of_a_pipe(monkeypatch):
    """Tables are as wide as in a pipe, whatever runs the tests has told them."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def sparda(tmp_path, monkeypatch):
    """Run the command line in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return CliRunner().invoke(cli.app, [str(a) for a in arguments])

    return run
