from __future__ import annotations

import dataclasses

from sparda_compile.bench import baselines, memory
from sparda_compile.bench.memory import FreeMemory


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
