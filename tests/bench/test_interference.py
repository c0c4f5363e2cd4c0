from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparda_compile.bench.timing import Spread
from sparda_compile.passes.machine import MACHINES

interference = pytest.importorskip("sparda_compile.bench.interference")

CPU = torch.device("cpu")
PRODUCTS = ((16, 32), (32, 16))


class PlainMemory:
    """Memory that is not pinned."""

    def __init__(self, num_bytes):
        self.tensor = torch.zeros(num_bytes, dtype=torch.uint8)
        self.is_open = True

    def close(self):
        self.is_open = False


def test_every_copy_brings_every_block():
    host = torch.arange(3 * interference._WORDS, dtype=torch.int32).view(3, -1)
    calls = interference._copies(host, 3, CPU)
    assert set(calls) == {
        "gather 1",
        "gather 2",
        "gather 4",
        "gather 8",
        "gather 16",
        "gather 32",
        "gather 64",
        "memcpy",
    }
    for name in ("gather 2", "memcpy"):
        calls[name]()
        blocks, _, _, pages, _ = calls["gather 2"].args
        want = host if name == "memcpy" else host[blocks.flatten().long()]
        assert torch.equal(pages.view(3, -1), want)
        pages.zero_()


def test_blocks_are_drawn_from_the_whole_region():
    host = torch.arange(40 * interference._WORDS, dtype=torch.int32).view(40, -1)
    calls = interference._copies(host, 6, CPU)
    blocks, _, _, pages, _ = calls["gather 2"].args
    assert blocks.numel() == blocks.unique().numel() == 6
    assert blocks.max() > 6
    calls["gather 2"]()
    assert torch.equal(pages.view(6, -1), host[blocks.flatten().long()])


def test_hidden_is_what_the_copy_adds_no_time_for(monkeypatch):
    made = []
    # Compute of all layers and of a few, copy, both, copy with the few.
    times = iter([100.0, 20.0, 40.0, 110.0, 45.0] * 2)

    def memory(num_bytes):
        made.append(PlainMemory(num_bytes))
        return made[0]

    def fake(calls):
        for call in calls:
            call()
        return Spread(next(times), 0.0, 0.0, 1)

    monkeypatch.setattr(interference, "PinnedMemory", memory)
    monkeypatch.setattr(interference, "graph_us", fake)
    monkeypatch.setattr(interference, "pinned_region_bytes", lambda: 0)
    monkeypatch.setattr(interference, "_copies", lambda *_: {"memcpy": lambda: None})
    found = interference.bench_interference(CPU, PRODUCTS, num_blocks=2)
    row = {"copy_us": 40.0, "both_us": 110.0, "hidden": 0.75, "held_up": 0.25}
    assert found == {
        f"b{batch}": {"compute_us": 100.0, "by_copy": {"memcpy": row}} for batch in (1, 16)
    }
    assert not made[0].is_open


def test_constants_are_what_products_take_beside_bytes_and_what_a_copy_takes_from_them():
    """Alone 2 us a product beside its bytes, then 4; the gather costs a fifth, then a tenth."""
    products = ((1000, 2000), (2000, 1000))
    found = {}
    for batch, kernel_us, hidden in ((1, 2.0, 0.8), (16, 4.0, 0.9)):
        num_bytes = 14 * 2 * 2 * (2_000_000 + batch * 3000)
        row = {"gather 64": {"hidden": hidden}, "memcpy": {"hidden": 0.5}}
        found[f"b{batch}"] = {"compute_us": 28 * kernel_us + num_bytes / 1e6, "by_copy": row}
    assert interference.machine_constants(found, 1000.0, products) == (3.0, 0.15)
    for row in found.values():  # a copy for nothing, and compute that is all bytes
        row["by_copy"]["gather 64"]["hidden"] = 1.1
        row["compute_us"] = 1.0
    assert interference.machine_constants(found, 1000.0, products) == (0.0, 0.0)


def test_constants_of_an_h200_are_those_of_its_run():
    file = Path(__file__).parents[2] / "benchmarks/results/2026-11-26-h200-kernels.json"
    (result,) = json.loads(file.read_text())["results"]
    machine = MACHINES["h200"]
    found = interference.machine_constants(result["beside"], machine.memory_gbps)
    assert (machine.kernel_us, machine.copy_share) == pytest.approx(found, rel=0.02)
    gather = result["gather"]
    rate = gather["by_programs"][str(gather["programs"])]["gbps"]
    assert machine.link_gbps == pytest.approx(rate, rel=0.01)


def test_one_gather_may_be_measured_alone():
    host = torch.zeros(3, interference._WORDS, dtype=torch.int32)
    assert set(interference._copies(host, 3, CPU, (8,))) == {"gather 8", "memcpy"}
