from __future__ import annotations

import json

import pytest
import torch

from sparda_compile.bench import calibration
from sparda_compile.bench.calibration import measure_machine, write_machine
from sparda_compile.passes.machine import LATENCY_US, Machine, calibration_file, machine_for

LATENCIES = {"select_pages": 11.25, "score_blocks": 3.5}
MACHINE = Machine("Fake GPU 9000", 1000.5, 20.25, 100.0, 1.5, overlaps=True, latency_us=LATENCIES)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Fake GPU 9000")


def test_what_is_written_is_what_is_planned_with(gpu, tmp_path):
    device = torch.device("cuda")
    assert machine_for(None, device).name == "h200"
    path = write_machine(MACHINE, "abc123")
    assert path == calibration_file("Fake GPU 9000")
    assert path.is_relative_to(tmp_path)
    assert machine_for(None, device) == MACHINE
    found = json.loads(path.read_text())
    assert found["environment"]["commit"] == "abc123"
    assert set(found) == {"machine", "environment"}


def test_each_constant_comes_from_its_measurement(gpu, monkeypatch):
    kernels = pytest.importorskip("sparda_compile.bench.kernels")
    interference = pytest.importorskip("sparda_compile.bench.interference")
    rows = {programs: {"gbps": float(programs)} for programs in (1, 8, 32)}
    monkeypatch.setattr(kernels, "bench_copy", lambda device: {"gbps": 4000.0})
    found = {"programs": 8, "by_programs": rows}
    monkeypatch.setattr(kernels, "bench_gather", lambda device: found)
    monkeypatch.setattr(
        kernels, "bench_latencies", lambda device, rate: {**LATENCIES, "plan_pages": rate}
    )
    monkeypatch.setattr(calibration, "matmul_tflops", lambda device: 700.0)
    monkeypatch.setattr(calibration, "_launch_us", lambda device: 1.25)
    monkeypatch.setattr(interference, "bench_interference", lambda device, programs: programs)
    monkeypatch.setattr(
        interference, "machine_constants", lambda found, gbps: (float(found[0]), gbps / 16000.0)
    )
    told = []
    machine = measure_machine(told.append)
    latencies = {**LATENCIES, "plan_pages": 4000.0}
    assert machine == Machine(
        "Fake GPU 9000",
        4000.0,
        8.0,
        700.0,
        1.25,
        overlaps=True,
        latency_us=latencies,
        kernel_us=8.0,
        copy_share=0.25,
    )
    assert len(told) == 6


@pytest.mark.gpu
def test_real_machine():
    machine = measure_machine(lambda text: None)
    assert machine.memory_gbps > machine.link_gbps > 1
    assert machine.tflops > 10
    assert 0.2 < machine.launch_us < 20
    assert all(0.2 < us < 100 for us in machine.latency_us.values())
    assert set(machine.latency_us) == set(LATENCY_US["h200"])
    assert 0.0 < machine.kernel_us < 20
    assert 0.0 <= machine.copy_share < 0.5
