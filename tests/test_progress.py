"""What is shown, logged and timed of start-up work."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
import threading
import time

import pytest

from sparda_compile import progress
from sparda_compile.progress import STAGES, showing, stage, stage_times

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def words(self):
        return " ".join(CONTROL.sub("", self.getvalue()).split())


@pytest.fixture
def open_terminal(monkeypatch):
    """Return a function that puts a terminal in place of standard error, with lines at once.

    To be called in the test itself: pytest puts its own standard error there before that.
    """

    def open_(quiet_s=0.0):
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(progress, "_QUIET_S", quiet_s)
        monkeypatch.setattr(progress, "_line", progress._Line())
        found = Terminal()
        monkeypatch.setattr(sys, "stderr", found)
        return found

    return open_


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told to."""

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", clock)
    return clock


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (
            ("compile", "piece of the decode step", 3, 6),
            "compiling piece 3 of 6 of the decode step",
        ),
        (("compile", "piece", 1, 2), "compiling piece 1 of 2"),
        (("compile", "", 1, 2), "compiling piece 1 of 2"),
        (("compile", "prefill", 0, 0), "compiling prefill"),
        (("capture", "", 0, 0), "tracing the model"),
        (("passes", "decode", 0, 0), "rewriting decode"),
        (("verify", "", 0, 0), "checking the order of all copies"),
    ],
)
def test_sentence(given, shown):
    assert progress._sentence(*given) == shown


def test_name_must_be_one_of_the_fixed_words():
    with (
        pytest.raises(AssertionError, match="stage 'link' is none of capture, passes"),
        stage("link"),
    ):
        pass
    assert set(progress._WORDS) == set(STAGES)


def test_times_are_exclusive_and_add_up(clock):
    with stage_times() as outer:
        with stage("capture"):
            clock.sleep(1)
            with stage_times() as inner, stage("passes"):
                clock.sleep(2)
                with stage("verify"):
                    clock.sleep(4)
            with stage("verify"):
                clock.sleep(8)
        with stage("compile"):
            clock.sleep(16)
    with stage("compile"):
        clock.sleep(32)
    assert outer.seconds == {"capture": 1, "passes": 2, "verify": 12, "compile": 16}
    assert outer.counts == {"capture": 1, "passes": 1, "verify": 2, "compile": 1}
    assert inner.seconds == {"passes": 2, "verify": 4}
    assert progress._recorders == []


def test_stage_in_itself_is_counted_once(clock):
    with stage_times() as times, stage("compile"):
        clock.sleep(1)
        with stage("compile"):
            clock.sleep(2)
    assert (times.seconds, times.counts) == ({"compile": 3}, {"compile": 2})


def fail(clock):
    clock.sleep(1.5)
    raise ZeroDivisionError


def test_failed_stage_is_timed_and_its_error_passes(clock, caplog):
    caplog.set_level(logging.INFO, "sparda_compile.progress")
    with stage_times() as times:
        with pytest.raises(ZeroDivisionError), stage("compile", "decode"):
            fail(clock)
        with stage("capture"):
            clock.sleep(1)
    assert times.seconds == {"compile": 1.5, "capture": 1}
    assert caplog.messages == ["compile: compiling decode failed after 1.50 s"]
    assert progress._stack.stages == []


def test_stages_of_threads_are_counted_and_do_not_nest():
    def work():
        with stage("compile"):
            time.sleep(0.02)

    with stage_times() as times, stage("passes"):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert times.counts == {"passes": 1, "compile": 3}
    assert times.seconds["compile"] >= 0.06
    assert times.seconds["passes"] >= 0.02


def test_log_has_compile_at_info_and_the_rest_at_debug(clock, caplog):
    caplog.set_level(logging.DEBUG, "sparda_compile.progress")
    for name in STAGES:
        with stage(name, "decode"):
            clock.sleep(2)
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert levels == {
        "capture: tracing decode took 2.00 s": "DEBUG",
        "passes: rewriting decode took 2.00 s": "DEBUG",
        "verify: checking decode took 2.00 s": "DEBUG",
        "compile: compiling decode took 2.00 s": "INFO",
        "allocate: allocating decode took 2.00 s": "DEBUG",
    }


def test_terminal_shows_each_stage_in_one_line_and_is_clean_after(open_terminal):
    terminal = open_terminal()
    with stage("capture", "[decode]"), stage("compile", "piece of the step", done=1, total=2):
        time.sleep(0.15)  # the line is redrawn twelve times a second
    assert "sparda: tracing [decode]" in terminal.words()
    assert "sparda: compiling piece 1 of 2 of the step" in terminal.words()
    assert_clean(terminal)


def assert_clean(terminal):
    """The line was erased, the cursor is back, and standard error is what it was."""
    text = terminal.getvalue()
    assert text.rfind("\x1b[2K") > text.rfind("sparda:")
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")
    assert sys.stderr is terminal
    assert progress._line.status is None
    assert progress._line.timer is None


def test_error_leaves_the_terminal_clean(open_terminal):
    terminal = open_terminal()
    with pytest.raises(ZeroDivisionError), stage("passes"), stage("compile"):
        raise ZeroDivisionError
    assert "sparda: " in terminal.words()
    assert_clean(terminal)


def test_what_others_write_goes_above_the_line(open_terminal):
    terminal = open_terminal()
    with stage("compile", "decode"):
        sys.stderr.write("a warning\n")
    assert "a warning" in terminal.words()
    assert_clean(terminal)


def test_long_stage_is_shown_while_it_runs_and_short_work_is_not(open_terminal):
    terminal = open_terminal(0.1)
    for _ in range(2):
        with stage("compile", "decode"):
            pass
    assert terminal.getvalue() == ""
    with stage("compile", "decode"):
        end = time.monotonic() + 20
        while "sparda: compiling decode" not in terminal.words():
            assert time.monotonic() < end
            time.sleep(0.01)
    assert_clean(terminal)


def test_many_short_stages_in_a_row_are_long_work(open_terminal):
    terminal = open_terminal(0.2)
    end = time.monotonic() + 20
    while not terminal.getvalue():
        assert time.monotonic() < end
        with stage("passes", "decode"):
            time.sleep(0.01)
    assert "sparda: rewriting decode" in terminal.words()
    terminal.truncate(0)
    time.sleep(0.3)
    with stage("passes", "decode"):
        pass
    assert "rewriting" not in terminal.words()


@pytest.mark.parametrize("flags", [(False,), (True, False), (False, True), (False, False)])
def test_silence_wins_and_ends(open_terminal, flags):
    terminal = open_terminal()

    def nested(left):
        if left:
            with showing(left[0]):
                nested(left[1:])
        else:
            with stage("compile", "decode"):
                time.sleep(0.02)

    nested(flags)
    assert terminal.getvalue() == ""
    nested((True,))
    assert "compiling decode" in terminal.words()


def test_silence_erases_a_line_that_is_there(open_terminal):
    terminal = open_terminal()
    with stage("compile", "decode"):
        with showing(False):
            assert_clean(terminal)
        assert progress._line.status is not None
    assert_clean(terminal)


@pytest.fixture
def file_in_place_of_stderr(monkeypatch):
    """Return a function that puts a file there, which gets a line for so many seconds of work."""

    def open_(plain_s):
        monkeypatch.setattr(progress, "_PLAIN_S", plain_s)
        monkeypatch.setattr(progress, "_line", progress._Line())
        found = io.StringIO()
        monkeypatch.setattr(sys, "stderr", found)
        return found

    return open_


def test_short_work_shows_nothing_where_there_is_no_terminal(file_in_place_of_stderr):
    file = file_in_place_of_stderr(60)
    for _ in range(2):
        with stage("compile", "decode"), stage("verify"):
            assert progress._line.status is None
        assert progress._line.timer is None
    assert file.getvalue() == ""


def test_long_work_shows_plain_lines_where_there_is_no_terminal(file_in_place_of_stderr):
    file = file_in_place_of_stderr(0.2)
    with stage("compile", "piece of the decode step", done=2, total=6):
        end = time.monotonic() + 20
        while file.getvalue().count("\n") < 2:  # nothing else begins or ends meanwhile
            assert time.monotonic() < end
            time.sleep(0.01)
    assert progress._line.timer is None
    line = r"sparda: compiling piece 2 of 6 of the decode step, \d+ s so far\n"
    assert re.fullmatch(f"(?:{line}){{2,}}", file.getvalue())


def test_silence_holds_where_there_is_no_terminal(file_in_place_of_stderr):
    file = file_in_place_of_stderr(0.0)
    with showing(False), stage("compile"):
        assert progress._line.timer is None
    assert file.getvalue() == ""


def test_work_goes_on_without_standard_error(monkeypatch):
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    monkeypatch.setattr(sys, "stderr", None)
    with stage("compile"):
        assert progress._line.status is None
        assert progress._line.timer is None


def test_import_and_use_need_neither_torch_nor_rich():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['rich'] = None\n"
        "from sparda_compile.progress import stage, stage_times\n"
        "with stage_times() as times, stage('compile'): pass\n"
        "print(times.counts)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("{'compile': 1}\n", "")
