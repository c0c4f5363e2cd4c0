"""What is recorded; the profiler stands for itself, since there is none without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparda_compile.profiling.record import record_events

EVENTS = [{"name": "gemm", "ph": "X"}]


@pytest.fixture
def log(monkeypatch):
    """What happened, in order."""
    happened = []

    class Profiler:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            happened.append("begin")
            return self

        def __exit__(self, *_):
            happened.append("end")

        def export_chrome_trace(self, path):
            Path(path).write_text(json.dumps({"traceEvents": EVENTS}), encoding="utf-8")

    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    return happened


def test_the_device_is_waited_for_under_the_profiler(log):
    assert record_events(lambda: log.append("call")) == EVENTS
    assert log == ["begin", "call", "wait", "end"]


def test_a_trace_is_kept_where_it_is_wanted(log, tmp_path):
    path = tmp_path / "kept.json"
    assert record_events(lambda: None, path) == EVENTS
    assert json.loads(path.read_text(encoding="utf-8"))["traceEvents"] == EVENTS


@pytest.mark.gpu
def test_a_kernel_is_seen_on_a_gpu():
    tensor = torch.ones(8, device="cuda")
    events = record_events(lambda: tensor.add_(1))
    kernels = [event for event in events if event.get("cat") == "kernel"]
    assert len(kernels) == 1
    assert kernels[0]["args"]["stream"] >= 0
