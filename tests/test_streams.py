from __future__ import annotations

import threading

import pytest

from sparda_compile.schedule import COMPUTE, COPY
from sparda_compile.streams import DeferredEngine, ImmediateEngine, current_engine, use_engine


class Log(list):
    """What was done, in order."""

    def work(self, name):
        return lambda: self.append(name)


@pytest.fixture
def log():
    return Log()


def test_immediate_engine_works_in_the_order_of_issue(log):
    engine = ImmediateEngine()
    engine.submit(COPY, log.work("copy"))
    engine.submit(COMPUTE, log.work("compute"))
    engine.record(0)
    engine.wait(0)
    assert log == ["copy", "compute"]


def test_deferred_engine_copies_only_when_waited_for(log):
    engine = DeferredEngine()
    for name in ("a", "b"):
        engine.submit(COPY, log.work(name))
    engine.record(0)
    engine.submit(COPY, log.work("c"))
    engine.record(1)
    engine.submit(COMPUTE, log.work("compute"))
    assert log == ["compute"]
    assert engine.num_pending == 3
    engine.wait(0)
    assert log == ["compute", "a", "b"]
    assert engine.num_pending == 1
    engine.wait(0)
    assert engine.num_pending == 1
    engine.wait(1)
    assert log == ["compute", "a", "b", "c"]
    assert engine.num_pending == 0


def test_waiting_for_a_later_event_does_all_before_it(log):
    engine = DeferredEngine()
    for event, name in enumerate("abc"):
        engine.submit(COPY, log.work(name))
        engine.record(event)
    engine.wait(1)
    assert log == ["a", "b"]


def test_waiting_for_an_unknown_event_does_nothing(log):
    engine = DeferredEngine()
    engine.submit(COPY, log.work("a"))
    engine.wait(7)
    assert log == []


def test_event_that_is_used_again_means_its_newest_mark(log):
    """A program numbers its events once and runs for every step."""
    engine = DeferredEngine()
    for step in range(2):
        engine.submit(COPY, log.work(step))
        engine.record(0)
    engine.wait(0)
    assert log == [0, 1]


@pytest.mark.parametrize("seed", range(8))
def test_seeded_engine_keeps_the_order_of_the_copy_stream(log, seed):
    engine = DeferredEngine(seed)
    for i in range(20):
        engine.submit(COPY, log.work(("copy", i)))
        engine.record(i)
        engine.submit(COMPUTE, log.work(("compute", i)))
    engine.wait(19)
    for stream in ("copy", "compute"):
        assert [i for name, i in log if name == stream] == list(range(20))
    assert engine.num_pending == 0


def test_seeds_give_orders_of_their_own():
    orders = set()
    for seed in [None, 0, 0, 1, 2]:
        engine, log = DeferredEngine(seed), Log()
        for i in range(12):
            engine.submit(COPY, log.work(("copy", i)))
            engine.submit(COMPUTE, log.work(("compute", i)))
        orders.add(tuple(log))
    assert len(orders) == 4


def test_engine_is_in_use_inside_the_block_only():
    before = current_engine()
    assert isinstance(before, ImmediateEngine)
    with use_engine(DeferredEngine()) as outer:
        assert current_engine() is outer
        with use_engine(DeferredEngine()) as inner:
            assert current_engine() is inner is not outer
        assert current_engine() is outer
    assert current_engine() is before


def test_other_threads_keep_the_immediate_engine():
    seen = []
    with use_engine(DeferredEngine()):
        thread = threading.Thread(target=lambda: seen.append(current_engine()))
        thread.start()
        thread.join()
    assert isinstance(seen[0], ImmediateEngine)


def test_engine_is_put_back_after_an_error():
    def fail():
        raise ValueError("from inside")

    before = current_engine()
    with pytest.raises(ValueError, match="from inside"), use_engine(DeferredEngine()) as engine:
        engine.submit(COMPUTE, fail)
    assert current_engine() is before
