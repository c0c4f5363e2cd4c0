from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile.bench.memory import FreeMemory

prr_layer = pytest.importorskip("sparda_compile.bench.prr_layer")
LayerSetting = prr_layer.LayerSetting

CPU = torch.device("cpu")
# 5 of the 7 blocks before the current one.
FEW = LayerSetting((5 / 7, 1.0), (1.0, 1.5), rounds=2, compiles=False)


def measure(shape, setting=FEW, said=None):
    say = (said if said is not None else []).append
    return prr_layer.measure_layer(CPU, shape, setting, 1.0, say)


@pytest.fixture
def result(small_layer, roomy, graph_clock, flashinfer):
    return measure(small_layer)


def test_every_program_is_compared_and_takes_turns_with_the_others(result, graph_clock):
    whole, reused = graph_clock[1], graph_clock[3]
    assert whole == [
        "torch_sdpa", "torch_select", "torch_flex", "flashinfer_auto", "query",
        "speculate_b1_c0.714286", "speculate_b1_c1", "speculate_b1_c1_update", "union_b1_c1",
        "speculate_b1.5_c0.714286", "speculate_b1.5_c1", "speculate_b1.5_c1_update",
        "union_b1.5_c1", "reuse_last",
    ]  # fmt: skip
    assert reused == ["torch_sdpa", "torch_select", "query", "reuse_last"]
    assert list(result["by_overlap"]) == ["0.9", "0.7"]
    first = result["by_overlap"]["0.9"]
    assert list(first["programs"]) == whole
    for name, row in first["programs"].items():
        assert name == "torch_select" or row["error"] < prr_layer.MOST_ERROR
        assert row["runs"] == 2
    assert first["skipped"] == {"flashinfer_fa2": "RuntimeError: no such backend"}
    assert (result["layers"], result["steps"], result["heads"]) == (2, 3, 8)


def test_rows_have_times_of_one_step_their_floor_and_their_ratios(result, small_layer):
    rows = result["by_overlap"]["0.9"]["programs"]
    assert rows["torch_sdpa"]["median"] == pytest.approx(100 / 6, abs=1e-3)
    assert (rows["torch_sdpa"]["form"], rows["torch_sdpa"]["over_torch"]) == ("flash_folded", 1.0)
    assert rows["query"]["over_torch"] == pytest.approx(100 / 104, abs=1e-3)
    assert rows["reuse_last"]["over_query"] == pytest.approx(104 / 113, abs=1e-3)
    assert rows["flashinfer_auto"]["plan_us"] > 0
    assert rows["flashinfer_auto"]["version"] == "0.6"
    serial = small_layer.pooled_bytes + 8 * small_layer.block_bytes
    assert rows["query"]["floor_us"] == pytest.approx(serial / 1e3, abs=1e-3)
    wasted = rows["speculate_b1.5_c0.714286"]
    assert wasted["floor_us"] == pytest.approx(
        (serial + 6 * small_layer.block_bytes) / 1e3, abs=1e-3
    )
    assert rows["torch_select"]["floor_us"] == small_layer.pooled_bytes / 1e3


def test_what_is_predicted_is_counted(result):
    rows = result["by_overlap"]["0.9"]["programs"]
    few = rows["speculate_b1.5_c0.714286"]
    assert (few["coverage"], few["missed"], few["wasted"]) == (0.7143, 2.0, 6.0)
    assert (few["budget"], few["stated_coverage"]) == (1.5, 5 / 7)
    every = rows["speculate_b1_c1"]
    assert (every["coverage"], every["missed"], every["wasted"]) == (1.0, 0.0, 0.0)
    assert all(row["same_bits"] for row in rows.values() if "same_bits" in row)
    # Four scored blocks of which 0.9 are kept are four; of which 0.7 are, three.
    assert (rows["reuse_last"]["coverage"], rows["reuse_last"]["unchanged"]) == (1.0, 1.0)
    last = result["by_overlap"]["0.7"]["programs"]["reuse_last"]
    assert (last["coverage"], last["missed"], last["unchanged"]) == (0.8571, 1.0, 0.0)


def test_headline_ladder_and_ablation(result):
    first = result["by_overlap"]["0.9"]
    line = first["headline"]
    assert (line["program"], line["budget"], line["updates"]) == (
        "speculate_b1.5_c1_update",
        1.5,
        True,
    )
    assert first["ladder"]["query"] == first["programs"]["query"]["median"]
    assert first["ladder"]["torch_sdpa_without_graph"] > 0
    assert first["best_torch"] == "torch_sdpa"
    assert first["ablation"]["ema"] == pytest.approx(line["over_torch"], abs=2e-3)
    second = result["by_overlap"]["0.7"]
    assert second["ablation"]["repair"] == second["programs"]["reuse_last"]["over_torch"]
    assert "headline" not in second


def test_what_does_not_fit_is_left_out(small_layer, monkeypatch):
    none = FreeMemory(0, 0)
    monkeypatch.setattr(FreeMemory, "now", classmethod(lambda cls, limit=None: none))
    found = measure(small_layer)
    assert found["by_overlap"] == {}
    assert "the cache of all layers needs" in found["skipped"]["everything"]


def test_ours_has_to_be_right(small_layer, roomy, graph_clock, no_flashinfer, monkeypatch):
    real = prr_layer.query_step

    def wrong(case):
        step = real(case)
        return lambda *place: 1.1 * step(*place)

    monkeypatch.setattr(prr_layer, "query_step", wrong)
    with pytest.raises(AssertionError, match="query is off by"):
        measure(small_layer)
    assert len(graph_clock) == 1  # the forms of SDPA, and nothing else


def test_what_others_offer_is_left_out_if_it_is_wrong(
    small_layer, roomy, graph_clock, no_flashinfer, monkeypatch
):
    prr_layer._flex.cache_clear()
    monkeypatch.setattr(prr_layer, "compiled_flex", lambda scale: lambda q, k, v: 2 * q)
    found = measure(small_layer, dataclasses.replace(FEW, overlaps=(0.9,)))
    skipped = found["by_overlap"]["0.9"]["skipped"]
    assert skipped["torch_flex"].startswith("its output is off by")
    assert "flashinfer" in skipped["flashinfer_auto"]
    prr_layer._flex.cache_clear()


def test_a_selection_may_be_compiled(small_layer, roomy, graph_clock, no_flashinfer, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: asked.append(options) or f)
    found = measure(small_layer, dataclasses.replace(FEW, overlaps=(0.9,), compiles=True))
    assert {"dynamic": False, "fullgraph": True} in asked
    first = found["by_overlap"]["0.9"]
    assert first["programs"]["torch_compiled"]["error"] < prr_layer.MOST_ERROR
    assert first["best_torch"] == "torch_sdpa"


def test_a_selection_that_does_not_follow_its_trace_is_refused(
    small_layer, roomy, graph_clock, monkeypatch
):
    real = prr_layer.torch_selection
    monkeypatch.setattr(
        prr_layer, "torch_selection", lambda case: lambda *at: real(case)(*at).flip(0)
    )
    with pytest.raises(AssertionError, match="does not follow its trace"):
        measure(small_layer)


def test_what_is_compared_is_next_to_what_the_paper_states():
    assert (LayerSetting().stated_coverage, LayerSetting().stated_budget) == (0.98, 1.5)
    assert LayerSetting((0.5, 0.8), (1.0,)).stated_coverage == 0.8


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [2, 8])
def test_a_layer_on_a_gpu(groups):
    from sparda_compile.bench.prr_case import DecodeShape

    setting = LayerSetting((0.9, 0.98), (1.0, 1.5), rounds=2)
    shape = DecodeShape(16384, 2, groups=groups)
    found = prr_layer.measure_layer(torch.device("cuda"), shape, setting, 4000.0, lambda text: None)
    first = found["by_overlap"]["0.9"]
    skipped = [name for name in first["skipped"] if not name.startswith("flashinfer")]
    assert skipped == []
    assert all(row["median"] > 0 for row in first["programs"].values())
    assert all(row["same_bits"] for row in first["programs"].values() if "same_bits" in row)
    assert first["headline"]["coverage"] == pytest.approx(0.98, abs=0.01)
