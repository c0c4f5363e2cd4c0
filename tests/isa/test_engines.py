from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from sparda_compile.isa.engines import (
    CudaEngine,
    DeferredEngine,
    DelayEngine,
    ImmediateEngine,
    current_engine,
    use_engine,
)
from sparda_compile.isa.streams import COMPUTE, COPY, SELECT


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


def test_deferred_engine_selects_when_a_copy_behind_it_is_waited_for(log):
    engine = DeferredEngine()
    engine.submit(COPY, log.work("first copy"))
    engine.record(0)
    engine.submit(SELECT, log.work("selection"))
    engine.submit(COPY, log.work("second copy"))
    engine.record(1)
    assert engine.num_pending == 3
    engine.wait(0)
    assert log == ["first copy"]
    engine.wait(1)
    assert log == ["first copy", "selection", "second copy"]
    assert engine.num_pending == 0


@pytest.mark.parametrize("seed", range(8))
def test_seeded_engine_selects_before_the_copies_behind_it(seed):
    engine, log = DeferredEngine(seed), Log()
    for i in range(20):
        engine.submit(SELECT, log.work(("select", i)))
        engine.submit(COPY, log.work(("copy", i)))
        engine.record(i)
        engine.submit(COMPUTE, log.work(("compute", i)))
    engine.wait(19)
    for stream in ("select", "copy", "compute"):
        assert [i for name, i in log if name == stream] == list(range(20))
    place = {entry: n for n, entry in enumerate(log)}
    assert all(place["select", i] < place["copy", i] for i in range(20))
    # Selections do not wait for the copies before them.
    assert any(place["select", i + 1] < place["copy", i] for i in range(19))


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


class FakeStream:
    """A stream that notes what is issued to it."""

    def __init__(self, log, name, priority=0):
        self.log, self.name, self.priority = log, name, priority

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for event {event.number}")


@pytest.fixture
def cuda(monkeypatch, log):
    """Put streams and events that only note what they are told in the place of CUDA's."""
    compute = FakeStream(log, "compute")
    current = [compute]
    numbers = iter(range(100))

    class FakeEvent:
        def __init__(self):
            self.number = next(numbers)

        def record(self, stream):
            log.append(f"event {self.number} on {stream.name}")

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    sides = iter(("copy", "select"))  # an engine makes them in this order

    def make(device, priority):
        assert device == torch.device("cuda:1")
        return FakeStream(log, next(sides, "copy"), priority)

    def current_stream(device):
        assert device == torch.device("cuda:1")
        return current[-1]

    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda cycles: log.append(("sleep", current[-1].name, cycles))
    )
    return lambda name: lambda: log.append(f"{name} on {current[-1].name}")


def test_cuda_engine_starts_copies_behind_the_compute_work_before_them(log, cuda):
    engine = CudaEngine(torch.device("cuda:1"))
    assert [side.priority for side in engine._sides.values()] == [-1, -1]
    engine.submit(COMPUTE, cuda("a"))
    engine.submit(COPY, cuda("b"))
    engine.submit(COMPUTE, cuda("c"))
    assert log == ["a on compute", "copy waits for compute", "b on copy", "c on compute"]


def test_cuda_engine_starts_a_copy_behind_the_selection_before_it_and_no_other(log, cuda):
    engine = CudaEngine(torch.device("cuda:1"))
    engine.submit(SELECT, cuda("ids"))
    engine.submit(SELECT, cuda("pages"))
    engine.submit(COPY, cuda("first"))
    engine.submit(COPY, cuda("second"))
    assert log == [
        "select waits for compute", "ids on select",
        "select waits for compute", "pages on select",
        "copy waits for compute", "copy waits for select", "first on copy",
        "copy waits for compute", "second on copy",
    ]  # fmt: skip


def test_cuda_engine_marks_the_copy_stream_and_holds_the_compute_stream(log, cuda):
    engine = CudaEngine(torch.device("cuda:1"))
    for _ in range(2):
        engine.record(7)
        engine.record(3)
        engine.wait(3)
        engine.wait(7)
    # One event for each number, from step to step: a captured graph has them in it.
    step = ["event 0 on copy", "event 1 on copy"]
    step += ["compute waits for event 1", "compute waits for event 0"]
    assert log == step * 2


def test_cuda_engine_refuses_an_event_that_nothing_recorded(cuda):
    del cuda
    with pytest.raises(KeyError):
        CudaEngine(torch.device("cuda:1")).wait(0)


def test_delay_engine_idles_around_the_work_and_keeps_its_order(log, cuda):
    engine = DelayEngine(torch.device("cuda:1"), seed=0, longest_us=5.0)
    for i in range(50):
        engine.submit(COPY, cuda(f"copy{i}"))
        engine.submit(COMPUTE, cuda(f"compute{i}"))
    sleeps = [entry for entry in log if isinstance(entry, tuple)]
    assert all(1 <= cycles < 5000 for _, _, cycles in sleeps)
    assert max(cycles for _, _, cycles in sleeps) > 4000
    assert 60 < len(sleeps) < 140
    assert {stream for _, stream, _ in sleeps} == {"copy", "compute"}
    work = [entry for entry in log if isinstance(entry, str) and " on " in entry]
    assert work == [f"{s}{i} on {s}" for i in range(50) for s in ("copy", "compute")]


def test_seed_of_a_delay_engine_gives_its_delays(log, cuda):
    runs = []
    for seed in (1, 1, 2):
        log.clear()
        engine = DelayEngine(torch.device("cuda:1"), seed)
        for _ in range(20):
            engine.submit(COPY, cuda("a"))
        runs.append(list(log))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.gpu
@pytest.mark.parametrize("late", [COPY, COMPUTE])
def test_cuda_engine_orders_a_copy_and_its_user(late):
    """Whichever stream is late, the copy reads what was computed and its user what was copied."""
    device = torch.device("cuda", torch.cuda.current_device())
    engine = CudaEngine(device)
    source, target, result = (torch.zeros(1 << 16, device=device) for _ in range(3))

    def copy():
        if late == COPY:
            torch.cuda._sleep(20_000_000)
        target.copy_(source)

    for step in range(1, 6):
        if late == COMPUTE:
            torch.cuda._sleep(20_000_000)
        source.fill_(step)
        engine.submit(COPY, copy)
        engine.record(0)
        engine.wait(0)
        engine.submit(COMPUTE, lambda: result.copy_(target))
        assert result.eq(step).all()


@pytest.mark.gpu
def test_copies_run_beside_the_compute_stream():
    device = torch.device("cuda", torch.cuda.current_device())
    engine = CudaEngine(device)
    flag = torch.zeros(1, device=device)
    seen = torch.zeros(1, device=device)
    # The driver may wait for the device when it loads a kernel that it has not run yet.
    torch.cuda._sleep(1)
    seen.copy_(flag.fill_(0)).item()
    engine.submit(COPY, lambda: (torch.cuda._sleep(200_000_000), flag.fill_(1)))
    engine.record(0)
    engine.submit(COMPUTE, lambda: seen.copy_(flag))
    assert seen.item() == 0  # the compute stream did not wait
    engine.wait(0)
    engine.submit(COMPUTE, lambda: seen.copy_(flag))
    assert seen.item() == 1


@pytest.mark.gpu
def test_selections_run_beside_copies():
    device = torch.device("cuda", torch.cuda.current_device())
    engine = CudaEngine(device)
    flag = torch.zeros(1, device=device)
    torch.cuda._sleep(1)  # so that nothing has to be loaded below
    flag.fill_(0).item()
    done = torch.cuda.Event()
    engine.submit(
        COPY, lambda: (torch.cuda._sleep(400_000_000), done.record(torch.cuda.current_stream()))
    )
    engine.submit(SELECT, lambda: flag.fill_(1))
    engine._stream(SELECT).synchronize()
    assert flag.item() == 1
    assert not done.query()
