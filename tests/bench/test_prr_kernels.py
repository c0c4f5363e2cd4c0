from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile.bench.prr_case import PrrCase

prr_kernels = pytest.importorskip("sparda_compile.bench.prr_kernels")

CPU = torch.device("cpu")
SMALL = prr_kernels.AttentionShape(
    tokens=512, heads=4, groups=2, dim=16, budgets=(64, 128), blocks=(16, 32)
)


def quiet(text):
    pass


def test_attention_alone(graph_clock, flashinfer, monkeypatch):
    monkeypatch.setattr(prr_kernels, "_L2_BYTES", 20_000)
    said = []
    result = prr_kernels.bench_attention(CPU, 1.0, said.append, SMALL)
    cells = result["cells"]
    assert [(c["block"], c["budget"]) for c in cells] == [(16, 64), (16, 128), (32, 64), (32, 128)]
    assert len(said) == 4
    for cell in cells:
        assert cell["error"] < prr_kernels.MOST_ERROR
        assert cell["sdpa_form"] == "flash_folded"
        assert cell["skipped"] == {"flashinfer_fa2": "RuntimeError: no such backend"}
        assert cell["flashinfer_auto_plan_us"] > 0
        assert cell["flashinfer"] == cell["flashinfer_auto"]
        # 2 KV heads of 16 channels, keys and values of 2 bytes.
        num_bytes = 2 * 16 * 2 * 2 * cell["budget"]
        assert cell["floor_us"] == pytest.approx(num_bytes / 1e3)
        assert cell["sets"] == -(-20_000 // num_bytes) if cell["budget"] == 128 else 3
        assert cell["ours"]["median"] == pytest.approx(100 / cell["sets"], abs=1e-3)
        assert cell["over_flashinfer"] == pytest.approx(1.03, abs=1e-3)
    assert result["ratios"]["over_sdpa"]["mean"] == pytest.approx(1.01, abs=1e-3)
    assert result["paper"] == {"mean": 2.22, "best": 3.71}


def test_sets_of_one_cache_share_no_block(monkeypatch):
    monkeypatch.setattr(prr_kernels, "_L2_BYTES", 1 << 30)
    cell = prr_kernels._Attention(CPU, SMALL, 16, 64)
    assert cell.sets == 8  # all there are
    for group in range(2):
        blocks = torch.cat([ids[0, group] for ids in cell.ids]).tolist()
        assert sorted(blocks) == list(range(32))


def test_cells_of_the_paper_have_its_ratio():
    shape = prr_kernels.AttentionShape()
    assert (shape.heads, shape.groups, shape.tokens) == (32, 8, 131072)
    for size in shape.blocks:
        assert len(prr_kernels._PAPER_OVER[size]) == len(shape.budgets)
    assert prr_kernels._PAPER_OVER[128][-1] == 3.71


def test_attention_alone_says_what_is_not_there(graph_clock, no_flashinfer, monkeypatch):
    monkeypatch.setattr(prr_kernels, "best_sdpa", lambda operands: (None, {"flash": "no"}))
    shape = prr_kernels.AttentionShape(512, 4, 2, 16, (64,), (16,))
    result = prr_kernels.bench_attention(CPU, 1.0, quiet, shape)
    (cell,) = result["cells"]
    assert cell["skipped"]["sdpa"] == "{'flash': 'no'}"
    assert "flashinfer" in cell["skipped"]["flashinfer_auto"]
    assert "flashinfer" not in cell
    assert "ours" in cell
    assert result["ratios"] == {}


def test_attention_that_is_wrong_is_not_timed(graph_clock, no_flashinfer, monkeypatch):
    real = prr_kernels.sparse_attention
    monkeypatch.setattr(prr_kernels, "sparse_attention", lambda *args: 1.1 * real(*args))
    with pytest.raises(AssertionError, match="attention is off by"):
        prr_kernels.bench_attention(CPU, 1.0, quiet, SMALL)
    assert graph_clock == []


def test_flashinfer_that_is_wrong_is_left_out(graph_clock, flashinfer, monkeypatch):
    real = flashinfer.BlockSparseAttentionWrapper.run
    monkeypatch.setattr(
        flashinfer.BlockSparseAttentionWrapper, "run", lambda self, *args: 2 * real(self, *args)
    )
    shape = prr_kernels.AttentionShape(512, 4, 2, 16, (64,), (16,))
    (cell,) = prr_kernels.bench_attention(CPU, 1.0, quiet, shape)["cells"]
    assert cell["skipped"]["flashinfer_auto"].startswith("its output is off by")
    assert "over_flashinfer" not in cell


def test_the_faster_backend_of_flashinfer_counts(graph_clock, flashinfer, monkeypatch):
    class Both(flashinfer.BlockSparseAttentionWrapper):
        def __init__(self, workspace, backend):
            super().__init__(workspace, backend="auto")

    monkeypatch.setattr(flashinfer, "BlockSparseAttentionWrapper", Both)
    shape = prr_kernels.AttentionShape(512, 4, 2, 16, (64,), (16,))
    (cell,) = prr_kernels.bench_attention(CPU, 1.0, quiet, shape)["cells"]
    # By the clock, whatever comes later takes longer.
    assert cell["flashinfer"] == cell["flashinfer_auto"] != cell["flashinfer_fa2"]
    assert cell["over_flashinfer"] == cell["over_flashinfer_auto"] < cell["over_flashinfer_fa2"]


def test_selection_alone(small_layer, graph_clock, monkeypatch):
    monkeypatch.setattr(prr_kernels, "_PAPER_SELECTION", {384: 48.0})
    result = prr_kernels.bench_selection(CPU, [small_layer], 1.0, quiet)
    row = result["by_tokens"]["384"]
    for name in ("score", "select", "both", "torch"):
        assert row[name]["median"] == 5.0
    assert row["paper_us"] == 48.0
    assert row["floor_us"] == small_layer.pooled_bytes / 1e3


def test_selection_that_is_wrong_is_not_timed(small_layer, graph_clock, monkeypatch):
    real = prr_kernels.select
    monkeypatch.setattr(prr_kernels, "select", lambda *args: [each.flip(0) for each in real(*args)])
    with pytest.raises(AssertionError, match="does not follow its trace"):
        prr_kernels.bench_selection(CPU, [small_layer], 1.0, quiet)


def test_prediction_alone(small_layer, graph_clock, monkeypatch):
    alone = dataclasses.replace(small_layer, attends=False, steps=1)
    before = PrrCase(CPU, alone).layers[0].level
    cases = []

    def made(*args):
        cases.append(PrrCase(*args))
        return cases[-1]

    monkeypatch.setattr(prr_kernels, "PrrCase", made)
    result = prr_kernels.bench_prediction(CPU, [small_layer], quiet)
    row = result["by_tokens"]["384"]
    assert (row["update"]["median"], row["predict"]["median"]) == (5.0, 5.0)
    assert row["calibrate"]["median"] == 5.0
    assert result["paper_us"] == 10.0
    after = cases[0].layers[0].level
    assert torch.equal(after[..., -1], before[..., -1])  # no key of the last block is there yet
    assert not (after[..., :-1] == before[..., :-1]).any()
