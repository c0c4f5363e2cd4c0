from __future__ import annotations

import dataclasses
import json

import pytest

from sparda_compile import environment
from sparda_compile.bench import baselines, memory
from sparda_compile.bench.lab import ResultFile
from sparda_compile.bench.memory import FreeMemory

HEAD = {"name": "decode", "shape": "tiny"}


@pytest.fixture(autouse=True)
def _commit(monkeypatch):
    monkeypatch.setattr(environment, "_commit", lambda: "abc123")


def result_file(tmp_path, **head):
    return ResultFile(tmp_path / "r.json", {**HEAD, **head}, "batch_size")


def test_each_result_is_written_at_once_and_kept(tmp_path):
    file = result_file(tmp_path)
    file.save({"batch_size": 16, "x": 1})
    assert [r["batch_size"] for r in json.loads(file.path.read_text())["results"]] == [16]
    file.save({"batch_size": 4, "x": 2})
    file.save({"batch_size": 16, "x": 3})
    again = result_file(tmp_path)
    assert again.results == [{"batch_size": 4, "x": 2}, {"batch_size": 16, "x": 3}]
    assert again.has(4)
    assert not again.has(8)
    assert again.content() == {**HEAD, "results": again.results}


def test_unfinished_result_is_measured_again(tmp_path):
    file = result_file(tmp_path)
    file.save({"batch_size": 1, "unfinished": "baselines"})
    assert not result_file(tmp_path).has(1)


def test_results_of_another_environment_are_not_mixed_in(tmp_path, monkeypatch):
    file = result_file(tmp_path)
    file.save({"batch_size": 1})
    assert not result_file(tmp_path, shape="8b").results
    assert not ResultFile(file.path, HEAD, "batch_size", "other").results
    document = json.loads(file.path.read_text())
    document["environment"]["date"] = "2020-01-01"
    file.path.write_text(json.dumps(document))
    assert result_file(tmp_path).has(1)
    document["environment"]["torch"] = "1.0"
    file.path.write_text(json.dumps(document))
    assert not result_file(tmp_path).results


@pytest.mark.parametrize("text", ["", "[1]", "{}"])
def test_file_that_holds_something_else(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    assert result_file(tmp_path).results == []


def test_result_is_saved_after_each_overlap_and_before_the_baselines(
    lab, setting, roomy, monkeypatch
):
    monkeypatch.setattr(
        baselines, "bench_baselines", lambda bench, model, shape, free: {"static": model}
    )
    setting = dataclasses.replace(setting, variants=("scheduled",), rounds=1)
    saved = []
    result = lab.decode(setting, saved.append, with_baselines=True)
    found = [(list(r["by_overlap"]), "baselines" in r, "unfinished" in r) for r in saved]
    both = ["0.0", "1.0"]
    assert found == [(["0.0"], False, True), (both, False, True), (both, True, False)]
    assert result is saved[2]
    assert result["baselines"] == {"static": lab.model}
    assert result["skipped"] == {}


def test_variants_without_room_are_left_out_with_a_reason(lab, setting, roomy, monkeypatch):
    told = []
    monkeypatch.setattr(lab, "say", told.append)
    scheduled = memory.layout_of(
        lab.shape, "scheduled", 2, 2048, setting.trace_steps, **setting.settings
    )
    free = FreeMemory(scheduled.num_bytes(on_host=False), 1 << 40)
    monkeypatch.setattr(FreeMemory, "now", classmethod(lambda cls, limit=None: free))
    setting = dataclasses.replace(
        setting, variants=("scheduled", "resident", "dense"), rounds=1, overlaps=(0.5,)
    )
    saved = []
    result = lab.decode(setting, saved.append, with_baselines=False)
    assert list(result["skipped"]) == ["resident", "dense"]
    assert "GiB of device memory" in result["skipped"]["dense"]
    assert "resident" not in result["by_overlap"]["0.5"]
    assert any(text.startswith("batch 2: dense is left out: its KV cache needs") for text in told)
    assert saved == [result | {"unfinished": saved[0]["unfinished"]}, result]


def test_batch_that_cannot_be_scheduled_is_left_out(lab, setting, monkeypatch):
    monkeypatch.setattr(FreeMemory, "now", classmethod(lambda cls, limit=None: FreeMemory(0, 0)))
    saved = []
    result = lab.decode(setting, saved.append, with_baselines=True)
    assert set(result["skipped"]) == {"scheduled", "inline", "resident", "dense"}
    assert result["by_overlap"] == {}
    assert saved == [result]


def test_budget_is_saved(lab, setting, monkeypatch):
    monkeypatch.setattr(FreeMemory, "now", classmethod(lambda cls, limit=None: FreeMemory(0, 0)))
    saved = []
    result = lab.budget(8.0, setting, saved.append)
    assert saved == [result]
    assert result["budget_gib"] == 8.0
    assert result["skipped"]
