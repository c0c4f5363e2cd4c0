"""The machines that the scheduler knows."""

from __future__ import annotations

import dataclasses

import pytest

from sparda_compile.machine import MACHINES


@pytest.mark.parametrize("name", MACHINES)
def test_constants_are_named_positive_and_in_proportion(name):
    machine = MACHINES[name]
    assert machine.name == name
    numbers = [v for v in dataclasses.astuple(machine) if isinstance(v, float)]
    assert len(numbers) == 4
    assert min(numbers) > 0
    # The link is what everything here is about: slower than the device's own memory.
    assert machine.link_gbps < machine.memory_gbps


def test_only_a_gpu_overlaps():
    assert {name: machine.overlaps for name, machine in MACHINES.items()} == {
        "cpu": False,
        "h200": True,
    }


def test_constants_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MACHINES["cpu"].link_gbps = 1.0
