from __future__ import annotations

import pytest
import torch

from sparda_compile.bench.timing import Spread
from sparda_compile.passes.machine import LATENCY_US

kernels = pytest.importorskip("sparda_compile.bench.kernels")

CPU = torch.device("cpu")


@pytest.mark.parametrize(("num_bytes", "copies"), [(1, 64), (16 << 20, 10), (1 << 30, 2)])
def test_data_sets_are_larger_than_the_cache(num_bytes, copies):
    assert kernels._copies(num_bytes) == copies


def test_misses_are_different_blocks():
    misses = kernels._random_misses(100, 40, CPU)
    assert misses.shape == (1, 2, 40)
    assert misses.dtype == torch.int32
    for group in misses[0]:
        assert len(set(group.tolist())) == 40
        assert 0 <= int(group.min()) <= int(group.max()) < 100


def test_gathered_keys_and_values_are_those_of_the_pages():
    pages = torch.randn(2, 3, 5, 2, kernels._SIZE, kernels._DIM)
    places = torch.tensor([4, 0]).expand(2, 3, 2)
    keys, values = kernels._gathered(pages, places)
    assert torch.equal(keys[1, 2], torch.cat([pages[1, 2, 4, 0], pages[1, 2, 0, 0]]))
    assert torch.equal(values[0, 1], torch.cat([pages[0, 1, 4, 1], pages[0, 1, 0, 1]]))


def test_reference_attention_knows_groups():
    query = torch.randn(1, 4, 1, 8)
    keys, values = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    out = kernels._sdpa(query, keys, values, 0.5)
    weights = torch.softmax(0.5 * query[0, 3] @ keys[0, 1].T, -1)
    torch.testing.assert_close(out[0, 3], weights @ values[0, 1])


def test_latencies_are_times_less_those_of_the_bytes(monkeypatch):
    small = {"_SIZE": 16, "_DIM": 16, "_SELECTED": 4, "_TOKENS": 256, "_BLOCKS": 16}
    for name, value in {**small, "_BLOCK_BYTES": 1024, "_L2_BYTES": 1}.items():
        monkeypatch.setattr(kernels, name, value)

    def fake(calls):
        for call in calls:  # each must run; Triton's interpreter does it here
            call()
        return Spread(100.0, 100.0, 100.0, 1)

    monkeypatch.setattr(kernels, "graph_us", fake)
    found = kernels.bench_latencies(CPU, 0.25)  # 250 bytes take a microsecond
    assert set(found) == set(LATENCY_US["h200"])
    windows = (256 - 32) // 16 + 1
    assert found["score_blocks"] == pytest.approx(100 - 2 * windows * 16 * 2 / 250, abs=0.01)
    attended = pytest.approx(100 - 2 * 4 * 1024 / 250, abs=0.01)
    assert found["attend_resident"] == found["sparse_attention"] == attended
    assert found["attend_missing"] == attended
    assert {found[op] for op in ("select_blocks", "plan_pages", "select_pages")} == {100.0}


def test_latency_is_never_less_than_nothing(monkeypatch):
    monkeypatch.setattr(kernels, "_selection", lambda device, batch: ({"score_blocks": []}, 10**9))
    monkeypatch.setattr(kernels, "_attention_data", lambda *sizes: ([], 0))
    monkeypatch.setattr(kernels, "graph_us", lambda calls: Spread(5.0, 5.0, 5.0, 1))
    assert kernels.bench_latencies(CPU, 1000.0)["score_blocks"] == 0.0
