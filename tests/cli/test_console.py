from __future__ import annotations

import io
import json
import logging
import sys

import pytest
import typer

from sparda_compile.cli import console
from sparda_compile.errors import CaptureError, ConfigError


@pytest.mark.parametrize(("error", "code"), [(ConfigError, 2), (CaptureError, 1)])
def test_errors_become_one_sentence(capsys, error, code):
    with pytest.raises(typer.Exit) as caught, console.errors_as_sentences():
        raise error("it is [wrong].")
    assert caught.value.exit_code == code
    assert capsys.readouterr().err == "Error: it is [wrong].\n"


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), console.errors_as_sentences():
        raise ZeroDivisionError


def test_progress_prints_lines_where_there_is_no_terminal(capsys):
    with console.progress() as say:
        say("reading")
    captured = capsys.readouterr()
    assert captured.err == "reading ...\n"
    assert captured.out == ""


def test_progress_leaves_the_log_as_it_was():
    log = logging.getLogger("sparda_compile.passes")
    before = (log.level, list(log.handlers))
    with console.progress():
        pass
    assert (log.level, log.handlers) == before


def test_progress_has_the_terminal_to_itself(monkeypatch):
    """The library's own line would fight with the status line of a command."""
    from sparda_compile import progress

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(progress, "_line", progress._Line())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress():
        assert progress._line.num_silent == 1
    assert progress._line.num_silent == 0


def test_written_files_are_named(tmp_path, capsys):
    console.print_paths([tmp_path, None])
    assert capsys.readouterr().out == f"Wrote {tmp_path}\n"


def test_no_page_beside_json():
    assert console.default_page("a.html", as_json=True) is None
    assert str(console.default_page("a.html", as_json=False)) == "a.html"


def test_errors_name_the_options_of_their_command(capsys):
    def command(local_blocks: int, tokens: int) -> None:
        del local_blocks, tokens

    with pytest.raises(typer.Exit), console.errors_as_sentences(command):
        raise ConfigError("max_tokens=3 is odd; lower local_blocks or pool_size.")
    said = capsys.readouterr().err
    assert said == "Error: --tokens 3 is odd; lower --local-blocks or pool_size.\n"


def test_json_is_one_line(capsys):
    console.print_json({"a": [1, None]})
    assert json.loads(capsys.readouterr().out) == {"a": [1, None]}


def test_console_is_wide_enough_for_tables(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console.make_console().width == 110


def test_console_is_as_wide_as_columns_says(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert console.make_console().width == 80
