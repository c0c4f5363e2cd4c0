"""The machines that the scheduler knows."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

from sparda_compile.errors import ConfigError
from sparda_compile.ops import OPS
from sparda_compile.passes.machine import (
    LATENCY_US,
    MACHINES,
    SCORES,
    calibration_file,
    machine_for,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
MEASURED = {
    "name": "h200", "memory_gbps": 4000.5, "link_gbps": 41.0, "tflops": 700.0, "launch_us": 2.5,
    "overlaps": True, "latency_us": {"select_pages": 9.5}, "kernel_us": 2.75, "copy_share": 0.2,
    "crowd_share": 0.3, "unpack_gnps": 500.0, "peer_gbps": 250.0,
    "scores": {"quest": {"gbps": 900.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_constants_are_named_positive_and_in_proportion(name):
    machine = MACHINES[name]
    assert machine.name == name
    numbers = [v for v in dataclasses.astuple(machine) if isinstance(v, float)]
    shares = (machine.copy_share, machine.crowd_share)
    assert len(numbers) == 9
    assert min(n for n in numbers if n not in shares) > 0
    # A copy takes nothing where nothing runs beside it.
    assert all(0 <= share < 0.5 for share in shares)
    assert all((share > 0) == machine.overlaps for share in shares)
    # The link is what everything here is about: slower than the device's own memory.
    assert machine.link_gbps < machine.memory_gbps
    assert machine.peer_gbps < machine.memory_gbps


def test_only_a_gpu_overlaps():
    assert {name: machine.overlaps for name, machine in MACHINES.items()} == {
        "cpu": False,
        "h100": True,
        "h200": True,
    }


def test_constants_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MACHINES["cpu"].link_gbps = 1.0


def test_every_machine_has_latencies_of_ops():
    assert set(LATENCY_US) == set(MACHINES)
    for name, latencies in LATENCY_US.items():
        assert MACHINES[name].latency_us == latencies
        assert set(latencies) <= set(OPS)
        # A phase more than an empty kernel's.
        assert min(latencies.values()) > MACHINES[name].launch_us


@pytest.mark.parametrize("name", MACHINES)
def test_selecting_and_planning_in_one_is_about_the_sum(name):
    machine = MACHINES[name]
    both = machine.latency_of("select_blocks") + machine.latency_of("plan_pages")
    assert machine.latency_of("select_pages") == pytest.approx(both, rel=0.15)


def test_op_without_a_latency_takes_a_launch():
    machine = dataclasses.replace(MACHINES["h200"], launch_us=7.0)
    assert machine.latency_of("append_kv") == 7.0
    assert machine.latency_of("plan_pages") == 4.05
    hash(machine)


@pytest.fixture
def calibration(monkeypatch, tmp_path):
    """Return the file that a GPU's measured constants are read from; it is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"ACME {device} (80 GB)")
    path = calibration_file("ACME cuda:0 (80 GB)")
    path.parent.mkdir()
    return path


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H200", "nvidia-h200"), ("  A/B.c_9 ", "a-b-c-9"), ("../../x", "x")],
)
def test_calibration_is_one_file_per_device(monkeypatch, tmp_path, device, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_file(device) == tmp_path / "sparda_compile" / f"machine-{name}.json"


@pytest.mark.parametrize("value", [None, ""])
def test_calibrations_are_in_the_users_cache(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setattr(Path, "home", lambda: Path("a-home"))
    assert calibration_file("X") == Path("a-home/.cache/sparda_compile/machine-x.json")


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("name", MACHINES)
def test_named_machine_is_taken_whatever_was_measured(calibration, name, device):
    calibration.write_text(json.dumps({"machine": MEASURED}))
    assert machine_for(name, device) is MACHINES[name]


def test_cpu_is_never_asked_for_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: pytest.fail("asked"))
    assert machine_for(None, CPU) is MACHINES["cpu"]


@pytest.mark.parametrize(
    ("device_name", "chosen"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("ACME 9000", "h200")],
)
def test_gpu_that_was_not_measured_is_planned_for_by_its_name(
    monkeypatch, tmp_path, caplog, device_name, chosen
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: device_name)
    with caplog.at_level(logging.INFO, logger="sparda_compile.passes.machine"):
        assert machine_for(None, GPU) is MACHINES[chosen]
    assert f"planning with {chosen}. Run `sparda calibrate`" in caplog.text


def test_gpu_that_was_measured_is_planned_for_as_it_is(calibration, caplog):
    calibration.write_text(json.dumps({"device": "ACME", "machine": MEASURED}))
    with caplog.at_level(logging.INFO, logger="sparda_compile.passes.machine"):
        machine = machine_for(None, GPU)
    assert dataclasses.asdict(machine) == MEASURED
    assert not caplog.text
    assert machine_for(None, torch.device("cuda:1")) is MACHINES["h200"]


def test_constants_without_latencies_have_those_of_an_h200(calibration):
    newer = (
        "latency_us",
        "kernel_us",
        "copy_share",
        "crowd_share",
        "unpack_gnps",
        "peer_gbps",
        "scores",
    )
    older = {key: value for key, value in MEASURED.items() if key not in newer}
    calibration.write_text(json.dumps({"machine": older}))
    machine = machine_for(None, GPU)
    assert machine.peer_gbps == MACHINES["h200"].peer_gbps
    assert machine.latency_us == LATENCY_US["h200"]
    assert (machine.kernel_us, machine.copy_share) == (3.1, 0.15)
    assert (machine.crowd_share, machine.unpack_gnps) == (0.27, 460.0)
    assert machine.scores == SCORES


@pytest.mark.parametrize(
    ("selector", "sequences", "us"),
    [
        ("infllm2", 1, 6.36), ("infllm2", 16, 29.64), ("lowbit2", 1, 13.72),
        ("lowbit2", 16, 73.3), ("lowbit4", 16, 100.66), ("lowbit2_forecast", 1, 7.54),
        ("lowbit2_forecast", 16, 51.77), ("lowbit4_forecast", 1, 9.7), ("forecast", 16, 19.33),
        ("forecast", 1, 3.68),
    ],
)  # fmt: skip
def test_scores_take_what_was_measured(selector, sequences, us):
    """128K tokens, 2 KV heads of 128: pooled keys, or codes with a span and a base."""
    pairs, bits = 2 * sequences, int(selector[6]) if selector.startswith("low") else 0
    block = 64 * 128 * bits // 8 + 2 * 128 * 2 if bits else 4 * 128 * 2
    assert MACHINES["h200"].score_us(selector, pairs * 2048 * block) == pytest.approx(us, rel=0.06)


def test_what_is_not_known_of_scores_is_read_at_the_rate_of_the_memory():
    machine = dataclasses.replace(MACHINES["h200"], scores={"slow": {"gbps": 9000.0}})
    assert machine.score_us("unknown", 4300e3) == pytest.approx(2.76 + 1.0)
    assert machine.score_us("slow", 4300e3) == pytest.approx(2.76 + 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({"machine": {**MEASURED, "colour": 1}}),
        json.dumps({"machine": {"name": "h200"}}),
    ],
)
def test_file_that_holds_no_machine_is_named(calibration, text):
    calibration.write_text(text)
    with pytest.raises(ConfigError, match="does not hold the constants") as error:
        machine_for(None, GPU)
    assert str(calibration) in str(error.value)
    assert "sparda calibrate" in str(error.value)
