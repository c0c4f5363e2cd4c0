"""StepGraph: with a CUDA graph made of lists on the CPU, and the real one where there is a GPU."""

from __future__ import annotations

import contextlib

import pytest
import torch

from sparda_compile.errors import CudaGraphError
from sparda_compile.program import graph_capture
from sparda_compile.program.step_graph import StepGraph


class FakeGraph:
    """Runs what was captured again, on the addresses that were captured."""

    made = 0

    def __init__(self):
        FakeGraph.made += 1
        self.work = None
        self.num_replays = 0

    def replay(self):
        self.num_replays += 1
        self.work()


class Step:
    """Adds the token to a state, in place; what it returns is memory of its own, kept."""

    def __init__(self, log, device="cpu"):
        self.log = log
        self.state = torch.zeros(3, device=device)
        self.ids, self.positions = (torch.zeros(3, device=device) for _ in range(2))
        self.weight = torch.arange(3.0, device=device)
        self.seen = []
        self.logits = None

    def arguments(self):
        return self.ids, self.weight, self.state, self.positions

    def __call__(self, ids, weight, state, positions):
        self.log.append("python")
        self.seen.append((ids, weight, state, positions))
        logits = torch.empty(3, device=ids.device)
        self.logits = logits

        def work():
            state.add_(ids)
            logits.copy_(state * weight + positions)

        if FakeCapture.graph is not None:
            FakeCapture.graph.work = work
        else:
            work()
        return logits


class FakeCapture:
    """The graph that is being captured."""

    graph = None


@pytest.fixture
def log(monkeypatch):
    """Replace CUDA graphs; return a list of what happened."""
    events = []

    @contextlib.contextmanager
    def capture(graph, **settings):
        events.append(("capture", settings))
        FakeCapture.graph = graph
        yield
        FakeCapture.graph = None

    FakeGraph.made = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 5))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: events.append("synchronize"))
    return events


def step_graph(step):
    return StepGraph(step, step.arguments(), (step.ids, step.positions))


def values(number):
    return torch.full((3,), float(number)), torch.full((3,), 100.0 * number)


def wanted(total, number):
    return [total * weight + 100.0 * number for weight in range(3)]


def test_first_call_runs_and_records_nothing(log):
    step = Step(log)
    run = step_graph(step)
    assert run(*values(2)).tolist() == wanted(2, 2)
    assert not run.is_captured
    assert log == ["python"]
    assert FakeGraph.made == 0


def test_second_call_captures_and_later_ones_replay(log):
    step = Step(log)
    run = step_graph(step)
    total = 0
    for number in (2, 5, 7, 1):
        total += number
        assert run(*values(number)).tolist() == wanted(total, number)
        assert step.state.tolist() == [total] * 3
    assert run.is_captured
    # Work in flight has ended before a capture begins; Python runs twice, whatever comes.
    settings = {"pool": (0, 5), "capture_error_mode": "thread_local"}
    assert log == ["python", "synchronize", ("capture", settings), "python"]
    assert FakeGraph.made == 1
    assert run._graph.num_replays == 3


def test_what_has_run_already_is_captured_at_the_first_call(log):
    step = Step(log)
    run = StepGraph(step, step.arguments(), (step.ids, step.positions), pool=(7, 7), has_run=True)
    for number, total in ((2, 2), (5, 7)):
        assert run(*values(number)).tolist() == wanted(total, number)
    settings = {"pool": (7, 7), "capture_error_mode": "thread_local"}
    assert log == ["synchronize", ("capture", settings), "python"]


def test_inputs_are_copied_to_where_the_graph_reads_them(log):
    step = Step(log)
    run = step_graph(step)
    for number in (1, 2, 3):
        ids, positions = values(number)
        run(ids, positions)
        assert ids.tolist() == [number] * 3
        assert step.ids.tolist() == [number] * 3
        assert step.positions.tolist() == [100.0 * number] * 3
    for seen in step.seen:
        assert all(one is other for one, other in zip(seen, step.arguments(), strict=True))


def test_logits_are_the_callers_own(log):
    step = Step(log)
    run = step_graph(step)
    results = [run(*values(1)) for _ in range(4)]
    assert [r.tolist() for r in results] == [wanted(n, 1) for n in (1, 2, 3, 4)]
    results[-1].fill_(-1.0)
    assert run(*values(1)).tolist() == wanted(5, 1)
    assert results[2].tolist() == wanted(3, 1)
    assert step.logits.data_ptr() not in {r.data_ptr() for r in results[1:]}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_every_input_needs_its_value(log, count):
    with pytest.raises(ValueError, match="zip"):
        step_graph(Step(log))(*[torch.zeros(3)] * count)


def test_failed_capture_leaves_the_next_call_to_try_again(log, monkeypatch):
    left = []
    monkeypatch.setattr(graph_capture, "_leave", lambda stream, pool: left.append((stream, pool)))
    step = Step(log)
    run = StepGraph(
        step, step.arguments(), (step.ids, step.positions), failed_in=lambda: " of the decode"
    )
    run(*values(1))
    whole, run._function = run._function, lambda *_: 1 // 0
    with pytest.raises(CudaGraphError, match=r"captured of the decode\. torch says: ZeroDivision"):
        run(*values(2))
    assert not run.is_captured
    assert left == [(None, (0, 5))]
    FakeCapture.graph = None
    run._function = whole
    assert run(*values(3)).tolist() == wanted(4, 3)
    assert run.is_captured


@pytest.mark.gpu
def test_graph_on_a_gpu_does_what_the_function_does():
    step, plain = Step([], "cuda"), Step([], "cuda")
    run = step_graph(step)
    results = []
    for number in range(1, 9):
        ids, positions = (v.cuda() for v in values(number))
        results.append(run(ids, positions))
        assert torch.equal(results[-1], plain(ids, plain.weight, plain.state, positions))
        assert torch.equal(step.state, plain.state)
    assert run.is_captured
    assert len(step.log) == 2
    assert len({r.data_ptr() for r in results}) == len(results)
