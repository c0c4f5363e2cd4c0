"""Where pinned memory comes to be, with a driver and a folder of the system that are made up."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from mmap import PAGESIZE

import pytest
import torch

from sparda_compile.runtime import numa
from sparda_compile.runtime.numa import ANYWHERE, Placement, placement_near

GPU = torch.device("cuda", 1)
ADDRESS = "0000:1b:00.0"
MINE = sorted(os.sched_getaffinity(0))
OURS = ",".join(map(str, MINE))


class Driver:
    """libcuda with one function; knows where the second device is."""

    def __init__(self, status=0):
        self.status = status

    def cuDeviceGetPCIBusId(self, text, size, ordinal):  # noqa: N802
        assert (size, ordinal) == (32, 1)
        text.value = ADDRESS.upper().encode()
        return self.status


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make a machine; what is None is not said."""

    def make(node="1", cpus=OURS, status=0):
        monkeypatch.setattr(numa.ctypes, "CDLL", {"libcuda.so.1": Driver(status)}.__getitem__)
        device, place = (
            tmp_path / "bus/pci/devices" / ADDRESS,
            tmp_path / f"devices/system/node/node{node}",
        )
        for folder, name, text in ((device, "numa_node", node), (place, "cpulist", cpus)):
            folder.mkdir(parents=True)
            if text is not None:
                (folder / name).write_text(f"{text}\n", encoding="ascii")
        return tmp_path

    return make


def test_memory_is_on_the_node_of_the_gpu(machine, caplog):
    with caplog.at_level(logging.INFO, "sparda_compile.runtime.numa"):
        place = placement_near(GPU, machine(cpus=f"{MINE[0]},100000-100003"))
    assert place.cpus == {MINE[0]}, "of the node's CPUs those that the process may run on"
    assert place.sentence == "near cuda:1 (0000:1b:00.0): on NUMA node 1, touched by 1 CPUs"
    assert caplog.messages == [f"pinned CPU memory is {place.sentence}"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"node": "-1"}, "does not say which NUMA node cuda:1 (0000:1b:00.0) is on"),
        ({"node": None}, "does not say which NUMA node"),
        ({"cpus": None}, "may run on no CPU of NUMA node 1"),
        ({"cpus": "100000-100003"}, "may run on no CPU of NUMA node 1"),
        ({"cpus": ""}, "may run on no CPU of NUMA node 1"),
        ({"status": 101}, "the CUDA driver does not say where cuda:1 is"),
    ],
)
def test_where_it_is_not_known_nothing_changes_and_the_reason_is_said(machine, said, words):
    place = placement_near(GPU, machine(**said))
    assert not place.cpus
    assert place.sentence.startswith("where the process runs: ")
    assert words in place.sentence


def test_a_machine_without_a_driver_does_not_say(monkeypatch, tmp_path):
    def no_library(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(numa.ctypes, "CDLL", no_library)
    assert "does not say where cuda:1 is" in placement_near(GPU, tmp_path).sentence


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0-3,8", {0, 1, 2, 3, 8}), ("5", {5}), ("", set()), ("0-1,4-5", {0, 1, 4, 5})],
)
def test_lists_are_as_linux_writes_them(text, cpus):
    assert numa._cpus(text) == cpus


@pytest.mark.parametrize("num_bytes", [1, PAGESIZE, 7 * PAGESIZE + 5])
def test_memory_is_filled_by_threads_that_are_bound(monkeypatch, num_bytes):
    touched, fill = [], ctypes.memset

    def memset(address, value, size):
        touched.append((threading.current_thread().name, os.sched_getaffinity(0), size))
        return fill(address, value, size)

    monkeypatch.setattr(numa.ctypes, "memset", memset)
    before = os.sched_getaffinity(0)
    memory = torch.full((num_bytes + 8,), 7, dtype=torch.uint8)
    Placement("near", frozenset(MINE[:1])).zero(memory.data_ptr(), num_bytes)
    assert not memory[:num_bytes].any()
    assert (memory[num_bytes:] == 7).all(), "and no byte beyond"
    assert {name.rpartition("_")[0] for name, _, _ in touched} == {"sparda-numa"}
    assert all(cpus == set(MINE[:1]) for _, cpus, _ in touched)
    assert os.sched_getaffinity(0) == before, "the thread that asked is as free as before"


def test_several_cpus_share_the_work(monkeypatch):
    bound = []
    # Made up, so that a machine of one CPU shares the work among three, too.
    monkeypatch.setattr(numa.os, "sched_setaffinity", lambda *given: bound.append(given))
    memory = torch.full((9 * PAGESIZE + 1,), 7, dtype=torch.uint8)
    Placement("near", frozenset({0, 1, 2})).zero(memory.data_ptr(), len(memory))
    assert not memory.any()
    assert set(bound) == {(0, frozenset({0, 1, 2}))}


def test_of_memory_that_no_gpu_reads_nothing_is_said():
    assert (ANYWHERE.sentence, ANYWHERE.cpus) == ("", frozenset())
