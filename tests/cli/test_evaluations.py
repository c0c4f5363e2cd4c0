from __future__ import annotations

import pytest
from typer.testing import CliRunner

from sparda_compile.cli import main as cli


def run(*arguments):
    return CliRunner().invoke(cli.app, ["eval", *arguments])


def test_help_names_both_commands():
    result = run("--help")
    assert result.exit_code == 0
    for name in ("tasks", "text"):
        assert f" {name} " in result.stdout


@pytest.mark.parametrize("name", ["tasks", "text"])
def test_each_has_its_own_help(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"eval {name}" in result.stdout
    assert ("--document" in result.stdout) == (name == "text")


@pytest.mark.parametrize("arguments", [["nothing"], ["--tokens", "10"], ["tasks", "nothing"]])
def test_what_names_no_command_is_for_the_generated_tasks(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "folder with a config.json" in said or "--tokens 10 is too small" in said


def test_text_needs_a_model_and_a_document():
    assert "Missing argument" in run("text").stderr
    assert "Missing option '--document'" in run("text", "smollm2").stderr
