from __future__ import annotations

import pytest
import torch

from sparda_compile.bench import timing
from sparda_compile.bench.timing import (
    Spread,
    graph_us,
    graphs_us,
    time_calls,
    time_turns,
    wait_for,
)


def test_spread():
    spread = Spread.of([float(i) for i in range(20, 0, -1)])
    assert spread == Spread(median=10.5, low=3.0, high=18.0, runs=20)
    assert spread.to_dict() == {"median": 10.5, "low": 3.0, "high": 18.0, "runs": 20}


def test_spread_of_one():
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)


def test_each_call_has_its_time():
    calls = []
    times = time_calls(lambda: calls.append(None), 5)
    assert len(calls) == len(times) == 5
    assert min(times) > 0


def test_calls_take_turns():
    calls = []
    times = time_turns([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert calls == ["a", "b"] * 3
    assert [len(each) for each in times] == [3, 3]
    assert min(map(min, times)) > 0


def test_only_a_gpu_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for name in ("cpu", "cuda"):
        wait_for(torch.device(name))
    assert waited == [torch.device("cuda")]


@pytest.mark.gpu
def test_graph_is_timed_by_call():
    values = [torch.zeros(1 << 24, device="cuda") for _ in range(3)]
    spread = graph_us([lambda v=v: v.add_(1) for v in values], rounds=4)
    assert spread.runs == 4
    assert spread.median > 10  # 128 MiB read and written
    assert all(int(v[0]) == 6 for v in values)  # once as it is, five replays


@pytest.mark.gpu
def test_graphs_take_turns():
    values = {name: torch.zeros(1 << 24, device="cuda") for name in "ab"}
    times = graphs_us({name: lambda v=v: v.add_(1) for name, v in values.items()}, rounds=3)
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3}
    assert all(int(v[0]) == 5 for v in values.values())  # once as it is, four replays


def test_rate_of_a_matrix_multiplication(monkeypatch):
    monkeypatch.setattr(timing, "_SIZE", 64)
    monkeypatch.setattr(timing, "time_calls", lambda call, runs: [2.0])
    assert timing.matmul_tflops(torch.device("cpu")) == round(2 * 64**3 / 2.0 / 1e6, 1)
