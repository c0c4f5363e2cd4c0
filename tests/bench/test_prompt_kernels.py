from __future__ import annotations

import pytest
import torch

from sparda_compile.bench.timing import Spread

prompt_kernels = pytest.importorskip("sparda_compile.bench.prompt_kernels")

CPU = torch.device("cpu")
SMALL = prompt_kernels.Shape(
    tokens=8, past=256, heads=16, block=8, dim=16, sink=1, local=2, scored=4
)


@pytest.fixture
def timed(monkeypatch):
    """A clock that says 100 us; each call still has to run, in Triton's interpreter here."""
    calls = []

    def fake(each, rounds):
        calls.append(len(each))
        each[0]()
        return Spread(100.0, 90.0, 110.0, rounds)

    monkeypatch.setattr(prompt_kernels, "graph_us", fake)
    monkeypatch.setattr(prompt_kernels, "matmul_tflops", lambda device: 500.0)
    return calls


def test_floors_are_those_of_the_larger_of_flop_and_bytes(timed):
    row = prompt_kernels._row([lambda: None], 1e12, 1e6, (500.0, 1000.0))
    assert (row["floor_us"], row["floors_us"]) == (2000.0, {"flop": 2000.0, "bytes": 1.0})
    assert (row["tflops"], row["of_matmul"]) == (10000.0, 20.0)
    row = prompt_kernels._row([lambda: None], 0.0, 1e9, (500.0, 1000.0))
    assert (row["floor_us"], row["tflops"]) == (1000.0, 0.0)


def test_every_kernel_is_compared_and_measured(timed, monkeypatch):
    monkeypatch.setattr(prompt_kernels, "_GROUPS", (2,))
    monkeypatch.setattr(
        prompt_kernels, "bench_others", lambda case, us, say: {f"flex_g{case.groups}": us}
    )
    said = []
    result = prompt_kernels.bench_prompt(CPU, 4000.0, said.append, SMALL)
    assert len(said) == 3
    tiles = [f"{name}_g2_rows_{rows}" for rows in (64, 128) for name in ("attend", "unions")]
    ops = [f"select_{name}_g2" for name in prompt_kernels._SELECTORS]
    ops += ["stage_g2", "attend_g2", "attend_published"]
    assert sorted(result["kernels"]) == sorted(ops + tiles)
    assert (result["tokens"], result["past"]) == (8, 256)
    assert result["kernels"]["attend_g2"]["error"] < 1e-2
    assert result["others"] == {"flex_g2": 100.0}
    assert result["kernels"]["select_infllm2_g2"]["same_blocks"] > 0.98
    # Tiles of 8 tokens: at least as many blocks as one of them reads, and not all of them.
    union = result["kernels"]["attend_g2_rows_64"]["union"]
    assert SMALL.selected <= union < SMALL.geometry.num_blocks
    published = result["kernels"]["attend_published"]
    assert (published["tokens"], published["selected"]) == (264, 8)
    assert published["published_over"] == 1584.2
    assert len(timed) == len(result["kernels"])


def test_wrong_results_are_not_timed(timed, monkeypatch):
    real = prompt_kernels.attend_tokens.attend_tokens
    monkeypatch.setattr(
        prompt_kernels.attend_tokens, "attend_tokens", lambda *args: 1.1 * real(*args)
    )
    with pytest.raises(AssertionError, match="off by"):
        prompt_kernels._attend(prompt_kernels.Case(CPU, SMALL, 2), (500.0, 4000.0))
    assert not timed
