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

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress():
        assert progress._line.num_silent == 1
    assert progress._line.num_silent == 0


def test_files_are_written_with_their_folder(tmp_path, capsys):
    path = tmp_path / "new" / "file.txt"

    def write(target):
        target.write_text("x")
        return target

    written = [console.write_file(write, path), console.write_file(write, None)]
    console.print_paths(written)
    assert path.read_text() == "x"
    assert capsys.readouterr().out == f"Wrote {path}\n"


def test_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        console.write_file(lambda path: path, tmp_path / "file" / "below")


def test_json_is_one_line(capsys):
    console.print_json({"a": [1, None]})
    assert json.loads(capsys.readouterr().out) == {"a": [1, None]}


def test_console_is_wide_enough_for_tables(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console.make_console().width == 110


def test_console_is_as_wide_as_columns_says(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert console.make_console().width == 80
