"""The watch of replayed steps: a rank that does not come ends them, and nothing else does."""

from __future__ import annotations

import threading
import time

import pytest

from sparda_compile.errors import RankLostError
from sparda_compile.ranks.replays import ReplayWatch


class Replay:
    """A step that ends when it is told to."""

    def __init__(self):
        self.is_over = threading.Event()

    def is_done(self):
        return self.is_over.is_set()


def until(condition, seconds=5.0):
    """Wait for a condition of another thread."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def never(reason):
    raise AssertionError(reason)


def test_steps_that_end_are_no_reason_to_stop():
    watch = ReplayWatch(0.5, lambda: never("aborted"), never)
    replays = [Replay() for _ in range(8)]
    for replay in replays:
        watch.ran(replay.is_done)
    for replay in replays:  # all of them together take longer than the timeout of one
        time.sleep(0.1)
        replay.is_over.set()
    until(lambda: not watch._running)
    watch.check()


def test_a_step_that_does_not_end_ends_the_group_and_is_said():
    replay, aborted = Replay(), []

    def abort():
        aborted.append(True)
        replay.is_over.set()

    watch = ReplayWatch(0.2, abort, never)
    watch.ran(replay.is_done)
    until(lambda: aborted)
    with pytest.raises(RankLostError, match=r"did not end within 0\.2 s.*start all of them again"):
        watch.check()


def test_where_that_does_not_help_the_process_ends():
    ended = []
    watch = ReplayWatch(0.1, lambda: time.sleep(60), ended.append, grace_s=0.2)
    watch.ran(lambda: False)
    until(lambda: ended)
    assert "another rank has ended" in ended[0]


def test_a_later_step_is_watched_by_the_same_thread():
    replay, aborted = Replay(), threading.Event()
    watch = ReplayWatch(0.3, aborted.set, lambda reason: None, grace_s=0.1)
    watch.ran(lambda: True)
    until(lambda: not watch._running)
    thread = watch._thread
    watch.ran(replay.is_done)
    assert aborted.wait(5)
    assert watch._thread is thread
