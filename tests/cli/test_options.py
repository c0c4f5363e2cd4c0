from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from sparda_compile import config
from sparda_compile.bench.names import ShapeName, VariantName
from sparda_compile.cli.main import app
from sparda_compile.cli.options import Choice, choices
from sparda_compile.evaluation.names import TaskName, TextTaskName
from sparda_compile.registry import HINTS, SELECTORS
from sparda_compile.training.names import Teacher

ROOT = Path(__file__).resolve().parents[2]


def commands(command=None, path=()):
    """Yield each command with the words that lead to it."""
    command = command or get_command(app)
    if hasattr(command, "commands"):
        for name, child in command.commands.items():
            yield from commands(child, (*path, name))
    else:
        yield path, command


COMMANDS = dict(commands())


def words(text):
    """Return the words of a help page without its frame: what a wide and a narrow one share."""
    return " ".join("".join(" " if c in "│╭╮╰╯─" else c for c in text).split())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_string_and_default_is_on_the_help_page(path):
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, [*path, "--help"])
    assert result.exit_code == 0, result.output
    page = words(result.stdout)
    for param in COMMANDS[path].params:
        assert words(param.help or "") in page, f"{param.name}: its help is not shown"
        assert "[default" not in (param.help or ""), f"{param.name}: rich takes it for markup"
        if isinstance(param.show_default, str):
            assert f"[default: ({param.show_default})]" in page
        elif param.default not in (None, False, ()):
            shown = "baseline" if param.default is True else param.default
            assert f"[default: {shown}]" in page, f"{param.name}: its default is not shown"


def test_some_defaults_are_written_by_hand():
    """The check above would pass without any."""
    by_hand = [
        param.name
        for command in COMMANDS.values()
        for param in command.params
        if isinstance(param.show_default, str)
    ]
    assert len(by_hand) > 20


NAMES = {
    "mode": get_args(config.Mode),
    "offload": get_args(config.Offload),
    "lowering": get_args(config.Lowering),
    "selector": SELECTORS.choices(),
    "hint": HINTS.choices(),
    "machine": config.MACHINE_NAMES,
    "shape": get_args(ShapeName),
    "variant": get_args(VariantName),
    "task": get_args(TaskName),
    "teacher": get_args(Teacher),
}
NAMED = [(path, p.name) for path in COMMANDS for p in COMMANDS[path].params if p.name in NAMES]


def test_each_list_of_names_is_offered_by_some_command():
    assert {name for _, name in NAMED} == set(NAMES)


@pytest.mark.parametrize(
    ("path", "name"), NAMED, ids=lambda part: "-".join([part] if isinstance(part, str) else part)
)
def test_names_are_choices(path, name):
    offered = NAMES[name]
    if (path, name) == (("bench", "profile"), "mode"):
        offered = [mode for mode in offered if mode != "dense"]
    if (path, name) == (("bench", "decode"), "mode"):
        offered = ["query", "forecast", "exact"]  # those that offload
    if (path, name) == (("eval", "text"), "task"):
        offered = get_args(TextTaskName)
    wrong = f"--{name}=nothing"
    target = ["tiny-llama"] if path in (("inspect",), ("train",)) else []
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, [*path, *target, wrong])
    assert result.exit_code == 2, result.output
    assert f"'nothing' is not one of {', '.join(map(repr, offered))}." in words(result.stderr)


def is_number(path, param):
    hints = get_type_hints(inspect.unwrap(COMMANDS[path].callback))
    return re.search(r"\b(int|float)\b", str(hints[param.name])) or param.name == "top_k"


def invoke(path, param, value):
    target = ["tiny-llama"] if path in (("inspect",), ("train",)) else []
    runner = CliRunner(env={"COLUMNS": "300"})
    return runner.invoke(app, [*path, *target, f"{param.opts[0]}={value}"])


NUMBERS = [
    pytest.param(path, param, id=" ".join([*path, param.opts[0]]))
    for path, command in COMMANDS.items()
    for param in command.params
    if param.name != "help" and is_number(path, param)
]
HOSTILE = ["-1", "-99999999999999999999", str(1 << 40), "9" * 30, "nan", "inf", "-inf", "1e400"]


@pytest.mark.parametrize(("path", "param"), NUMBERS)
def test_hostile_numbers_are_refused_before_any_work(path, param):
    """Either typer refuses them, or a sentence of ours does, which names the option."""
    for value in HOSTILE:
        result = invoke(path, param, value)
        assert result.exit_code == 2, f"{value}: {result.output}"
        assert isinstance(result.exception, SystemExit), f"{value}: {result.exception!r}"
        assert param.opts[0] in result.stderr


def complete(*given):
    """Return what a shell offers for the last word."""
    line = " ".join(["sparda", *given])
    run = subprocess.run(
        [sys.executable, "-c", "from sparda_compile.cli.main import main; main()"],
        env={
            **os.environ, "_SPARDA_COMPLETE": "complete_bash", "COMP_WORDS": line,
            "COMP_CWORD": str(len(given)),
        },
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.stdout.split()


def test_the_shell_completes_names():
    assert complete("inspect", "tiny-llama", "--mode", "e") == ["exact"]
    assert complete("bench", "decode", "--shape", "8") == ["8b", "8b-8kv"]
    assert "inspect" in complete("i")


def test_a_choice_is_the_string_that_it_is_named():
    names = choices("Names", ["8b", "a-b"])
    choice = names("8b")
    assert issubclass(names, Choice)
    assert choice == "8b"
    assert {"8b": 1}[choice] == 1
    assert f"{choice} {choice!r} {choice!s}" == "8b '8b' 8b"
    assert json.dumps({"name": choice}) == '{"name": "8b"}'
