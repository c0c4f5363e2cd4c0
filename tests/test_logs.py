"""`SPARDA_LOGS`: what it shows of the log, and what it says of a wrong value."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from sparda_compile.errors import ConfigError
from sparda_compile.logs import show_logs

RECORDS = """
import logging
import sparda_compile
for room in ("passes.manager", "progress"):
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        logging.getLogger("sparda_compile." + room).log(level, "of %s", room)
logging.getLogger("another").warning("of another")
"""


@pytest.fixture(autouse=True)
def silence():
    yield
    show_logs("")


def shown(capsys):
    lines = capsys.readouterr().err.splitlines()
    return [tuple(line.split()[2:4]) for line in lines]


def speak():
    for room in ("passes.manager", "passes.machine", "progress"):
        log = logging.getLogger(f"sparda_compile.{room}")
        log.debug("quiet")
        log.info("loud")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("warning", []),
        ("info", ["INFO"] * 3),
        ("DEBUG", ["DEBUG", "INFO"] * 3),
        ("passes=debug", ["DEBUG", "INFO"] * 2),
        ("passes.manager=debug", ["DEBUG", "INFO"]),
        ("info, passes.manager=debug", ["DEBUG", "INFO", "INFO", "INFO"]),
        ("debug,passes=error", ["DEBUG", "INFO"]),
    ],
)
def test_levels_and_rooms(capsys, text, expected):
    show_logs(text)
    speak()
    assert [level for level, _ in shown(capsys)] == expected


def test_last_call_counts(capsys):
    show_logs("passes=debug")
    show_logs("progress=info")
    speak()
    assert shown(capsys) == [("INFO", "sparda_compile.progress:")]


def test_who_listens_more_closely_shows_no_more(capsys):
    """The command line sets a room's logger to DEBUG for its status line."""
    show_logs("info")
    logging.getLogger("sparda_compile.passes").setLevel(logging.DEBUG)
    try:
        speak()
    finally:
        logging.getLogger("sparda_compile.passes").setLevel(logging.NOTSET)
    assert [level for level, _ in shown(capsys)] == ["INFO"] * 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("verbose", r"SPARDA_LOGS=verbose: level='verbose' is not known; use one of debug, info"),
        ("passes=1", r"level='1' is not known"),
        ("info,", r"level='' is not known"),
        ("pases=debug", r"room='pases' is not known; use one of api, .* Did you mean 'passes'"),
        ("=debug", r"room='' is not known"),
        ("../tests=debug", r"room='../tests' is not known"),
        ("passes.nothing=debug", r"room='passes.nothing' is not known"),
    ],
)
def test_wrong_value_is_a_sentence_and_changes_nothing(capsys, text, sentence):
    show_logs("progress=info")
    with pytest.raises(ConfigError, match=sentence):
        show_logs(text)
    speak()
    assert len(shown(capsys)) == 1


def run(text, *arguments):
    environment = os.environ | {"SPARDA_LOGS": text}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(("text", "num_lines"), [("", 3), ("info", 5), ("progress=debug,error", 4)])
def test_variable_counts_when_the_package_is_imported(text, num_lines):
    lines = run(text, "-c", RECORDS).stderr.splitlines()
    assert len(lines) == num_lines
    assert "of another" in lines[-1]


def test_wrong_variable_is_a_warning():
    result = run("lots", "-c", RECORDS)
    assert "UserWarning: no log is shown: SPARDA_LOGS=lots: level='lots'" in result.stderr


def test_command_line_shows_the_log_beside_its_result(tmp_path):
    arguments = ["-m", "sparda_compile", "inspect", "tiny-llama", "--json"]
    result = run("passes=debug", *arguments)
    assert " DEBUG sparda_compile.passes.manager: decode insert_prefetch: " in result.stderr
    assert result.stdout.startswith("{")
    assert "DEBUG" not in result.stdout
