from __future__ import annotations

import builtins
import io
import json
import signal
import sys

import pytest
import typer

from sparda_compile.chat.turn import Turn
from sparda_compile.cli import chat_loop
from sparda_compile.cli.chat_loop import ChatLoop, interruptible
from sparda_compile.errors import KVCacheError


class Conversation:
    """Answers with what it was asked, in two pieces; some questions make trouble."""

    def __init__(self):
        self.asked = []

    def ask(self, question, show, stop):
        self.asked.append(question)
        if question == "full":
            raise KVCacheError("the cache is full; lower top_k or leave.")
        if question in ("stop", "stop twice"):
            signal.raise_signal(signal.SIGINT)
        if question == "stop twice":
            signal.raise_signal(signal.SIGINT)
        is_stopped = stop is not None and stop.is_set
        for piece in ("I heard ", f"{question}."):
            show(piece)
        return Turn(
            question, f"I heard {question}.", "interrupted" if is_stopped else "end", 3, 2, 5, 0.1,
            9.0, 0, 0, 1.0, 2, 3, "grown" if question == "long" else "",
        )  # fmt: skip

    def stats(self):
        return "7 hits"

    def reset(self):
        return "all gone"


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """Interrupt as a shell's program does: one that runs in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def talk(capfd):
    """Return a function that has a conversation and returns answers, facts and questions."""

    def run(*lines, is_terminal=False, as_json=False):
        conversation = Conversation()
        ChatLoop(conversation, is_terminal=is_terminal, as_json=as_json).run(iter(lines))
        return *capfd.readouterr(), conversation.asked

    return run


def test_answers_are_alone_on_standard_output(talk):
    out, err, asked = talk("one\n", "\n", "/stats\n", "long\n")
    assert out == "I heard one.\nI heard long.\n"
    assert asked == ["one", "long"]
    assert err.splitlines() == [
        str(Turn("", "", "end", 3, 2, 5, 0.1, 9.0, 0, 0, 1.0, 2, 3)),
        "7 hits",
        "grown",
        str(Turn("", "", "end", 3, 2, 5, 0.1, 9.0, 0, 0, 1.0, 2, 3)),
    ]


def test_json_is_one_object_a_turn(talk):
    out, _, _ = talk("one", "two", as_json=True)
    turns = [json.loads(line) for line in out.splitlines()]
    assert [turn["answer"] for turn in turns] == ["I heard one.", "I heard two."]


def test_quit_ends_it(talk):
    assert talk("one", "/quit", "two")[2] == ["one"]


def test_at_a_terminal_errors_are_said_and_it_goes_on(talk):
    out, err, _ = talk("full", "/poem", "one", is_terminal=True)
    assert "Error: the cache is full; lower /top-k or leave." in err
    assert "/poem is no command; use one of /mode" in err
    assert out == "I heard one.\n"


@pytest.mark.parametrize(("line", "code"), [("full", 1), ("/poem", 2)])
def test_in_a_pipe_errors_end_it(talk, line, code, capfd):
    with pytest.raises(typer.Exit) as caught:
        talk(line, "one")
    assert caught.value.exit_code == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("Error: ") == 1


def test_ctrl_c_ends_an_answer(talk):
    out, err, asked = talk("stop", "one", is_terminal=True)
    assert out == "I heard stop.\nI heard one.\n"
    assert "Ctrl-C again stops at once" in err
    assert err.count("interrupted") == 1
    assert asked == ["stop", "one"]


def test_second_ctrl_c_takes_the_question_back(talk):
    out, err, _ = talk("stop twice", "one", is_terminal=True)
    assert out == "I heard one.\n"
    assert "the question is taken back, and all is read again" in err


def test_ctrl_c_ends_a_pipe(talk):
    with pytest.raises(typer.Exit) as caught:
        talk("stop", "one")
    assert caught.value.exit_code == 130


def test_what_ctrl_c_did_before_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as stop:
        assert signal.getsignal(signal.SIGINT) is not before
        assert not stop.is_set
    assert signal.getsignal(signal.SIGINT) is before


def test_lines_of_a_terminal(monkeypatch, capfd):
    typed = iter(["one", KeyboardInterrupt, "two", EOFError])

    def read(prompt):
        found = next(typed)
        if isinstance(found, type):
            raise found
        return found

    monkeypatch.setattr(builtins, "input", read)
    assert list(chat_loop.lines_of_a_terminal()) == ["one", "", "two"]
    assert "Ctrl-D leaves" in capfd.readouterr().err


def test_lines_of_a_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert [line.strip() for line in chat_loop.lines_of_a_pipe()] == ["one", "two"]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_not_utf8_is_refused_by_itself(talk, monkeypatch, capfd, errors):
    """In a locale of UTF-8 standard input is strict, and in that of C it is not."""
    given = io.BytesIO(b"one\nt\xff\xfeo\nthree\n")
    stdin = io.TextIOWrapper(given, encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", stdin)
    lines = list(chat_loop.lines_of_a_pipe())
    _, err, asked = talk(*lines, is_terminal=True)
    assert asked == ["one", "three"]
    assert "Error: the line is no text: its character 2 is not UTF-8" in err
    with pytest.raises(typer.Exit) as caught:
        talk(*lines)
    assert caught.value.exit_code == 2
    assert capfd.readouterr().out == "I heard one.\n"
