from __future__ import annotations

import json

import pytest
import torch

from sparda_compile import environment
from sparda_compile.bench.result_file import ResultFile

prr = pytest.importorskip("sparda_compile.bench.prr")

CPU = torch.device("cpu")
SIZES = {"block": 16, "pool": 8, "sink": 1, "local": 2, "scored": 4, "steps": 2}


@pytest.fixture(autouse=True)
def _commit(monkeypatch):
    monkeypatch.setattr(environment, "_commit", lambda: "abc123")


def bench_of(tmp_path, said=None, **fields):
    setting = prr.PrrSetting(**fields)
    file = ResultFile(tmp_path / "prr.json", setting.head, "part")
    bench = prr.PrrBench(setting, file, CPU, (said if said is not None else []).append)
    bench.__dict__["gbps"] = 4000.0
    return bench


def test_what_the_bars_are_about_comes_first(tmp_path):
    names = [part.name for part in bench_of(tmp_path).parts()]
    assert names[:4] == [
        "8b 131072 tokens batch 1", "8b-8kv 131072 tokens batch 1",
        "8b 131072 tokens batch 16", "8b-8kv 131072 tokens batch 16",
    ]  # fmt: skip
    assert names[4:9] == [
        "attention", "selection 8b", "prediction 8b", "selection 8b-8kv", "prediction 8b-8kv",
    ]  # fmt: skip
    assert names[9:12] == [
        "8b 131072 tokens batch 4", "8b-8kv 131072 tokens batch 4", "8b 524288 tokens batch 1",
    ]  # fmt: skip
    assert len(names) == len(set(names)) == 5 + 4 * 3 * 2


def test_default_ends_in_ten_minutes(tmp_path):
    assert sum(part.minutes for part in bench_of(tmp_path).parts()) < 10


def test_shapes_are_those_of_the_models():
    setting = prr.PrrSetting()
    shape = setting.shape("8b-8kv", 65536, 4)
    assert (shape.heads, shape.groups, shape.dim, shape.batch) == (32, 8, 128, 4)
    assert (shape.selected, shape.block) == (96, 64)
    assert setting.head["coverages"] == [0.7, 0.9, 0.98, 1.0]
    assert setting.head["overlaps"] == [0.9, 0.7]


@pytest.fixture
def tiny(small_layer, roomy, graph_clock, no_flashinfer, tmp_path, monkeypatch):
    """Everything, of a tiny model on the CPU, but for attention alone, whose sizes are fixed."""
    monkeypatch.setattr(prr, "bench_attention", lambda *args: {"cells": []})
    layer = prr.LayerSetting((5 / 7, 1.0), (1.0,), rounds=1)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    fields = {"shapes": ("tiny",), "tokens": (384,), "batches": (2,), "layer": layer}
    return lambda said=None: bench_of(
        tmp_path, said, **fields, contexts=(384,), sizes=SIZES
    )  # fmt: skip


def test_every_part_is_written_and_kept(tiny, monkeypatch):
    said = []
    bench = tiny(said)
    assert not bench.is_done()
    found = bench.run(10)
    assert [part["status"] for part in found] == ["done"] * 4
    assert "384 tokens, batch 2, overlap 0.9" in said
    written = json.loads(bench.file.path.read_text())
    parts = {result["part"]: result for result in written["results"]}
    assert sorted(parts) == [
        "attention", "prediction tiny", "selection tiny", "summary", "tiny 384 tokens batch 2",
    ]  # fmt: skip
    layer = parts["tiny 384 tokens batch 2"]
    assert (layer["shape"], layer["tokens"], layer["batch"]) == ("tiny", 384, 2)
    assert "torch_compiled" in layer["by_overlap"]["0.9"]["programs"]  # of the first context
    line = layer["by_overlap"]["0.9"]["headline"]
    assert parts["summary"]["found"]["best_over_torch"] == line["over_torch"]
    assert (written["name"], written["environment"]["commit"]) == ("prr", "abc123")
    again = tiny()
    assert again.is_done()
    assert [part["status"] for part in again.run(0)] == ["kept"] * 4


def test_parts_that_do_not_end_in_time_are_left_out(tiny):
    found = tiny().run(0.0)
    assert {part["status"] for part in found} == {"left out"}
    assert not tiny().is_done()


def test_a_part_that_fails_is_reported(tiny, monkeypatch):
    def fails(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(prr, "bench_selection", fails)
    status = {part["name"]: part["status"] for part in tiny().run(10)}
    assert status.pop("selection tiny") == "failed"
    assert set(status.values()) == {"done"}


def test_bandwidth_is_measured_once(tiny, monkeypatch):
    kernels = pytest.importorskip("sparda_compile.bench.kernels")
    asked = []
    monkeypatch.setattr(kernels, "bench_copy", lambda d: asked.append(d) or {"gbps": 3000.0})
    bench = tiny()
    del bench.__dict__["gbps"]
    assert (bench.gbps, bench.gbps) == (3000.0, 3000.0)
    assert asked == [CPU]
