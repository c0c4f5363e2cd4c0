"""A tiny model on the CPU, measured as if it were on a GPU."""

from __future__ import annotations

import copy
import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from sparda_compile.bench import decode, memory, prr_case
from sparda_compile.bench.decode import DecodeSetting
from sparda_compile.bench.lab import Lab
from sparda_compile.bench.timing import Spread

SMALL = {"lowering": "eager", "top_k": 4, "local_blocks": 2}


@pytest.fixture(autouse=True)
def _no_search_for_garbage(monkeypatch):
    """It takes longer than most of these tests."""
    monkeypatch.setattr(memory, "gc", SimpleNamespace(collect=lambda: 0))


@pytest.fixture(scope="session")
def lab():
    """The tiny shape; its forward is traced once."""
    lab = Lab("tiny", lambda text: None, device="cpu")
    assert lab.captures
    return lab


@pytest.fixture(scope="session")
def prompts(lab):
    """The programs of the tiny shape that read prompts; blocks are small, and few are read."""
    programs = lab.prompts
    programs.configure(block_size=16, **SMALL)
    return programs


@pytest.fixture
def setting():
    return DecodeSetting(
        2, 2048, overlaps=(0.0, 1.0), rounds=2, steps=2, settings=dict(SMALL)
    )  # fmt: skip


@pytest.fixture
def roomy(monkeypatch):
    """A machine with memory for everything; the rate of its link is made up."""
    free = memory.FreeMemory(1 << 40, 1 << 40)
    monkeypatch.setattr(memory.FreeMemory, "now", classmethod(lambda cls, limit=None: free))
    monkeypatch.setattr(decode, "memcpy_gbps", lambda: 10.0)


@pytest.fixture
def small_layer(monkeypatch):
    """Sizes of one layer's decode steps; two layers are enough where there is no cache to flush."""
    monkeypatch.setattr(prr_case, "_MOST_LAYERS", 2)
    monkeypatch.setattr(prr_case, "_MOST_SUMMARIES", 2)
    return prr_case.DecodeShape(
        tokens=384, batch=2, heads=8, groups=2, dim=16, block=16, pool=8, sink=1, local=2, scored=4,
        overlap=0.75, steps=3,
    )  # fmt: skip


class NaiveBlockSparse:
    """What FlashInfer's wrapper says that it does, row by row in fp32, and when it was planned."""

    def __init__(self, workspace, backend):
        if backend == "fa2":
            raise RuntimeError("no such backend\nat all")
        self.device = workspace.device

    def plan(self, indptr, indices, M, N, R, C, num_qo_heads, num_kv_heads, head_dim, *,
             q_data_type, o_data_type):  # fmt: skip
        assert (num_qo_heads, num_kv_heads, q_data_type) == (1, 1, o_data_type)
        assert indptr.dtype == indices.dtype == torch.int32
        self.rows = [indices[a:b].tolist() for a, b in pairwise(indptr.tolist())]
        assert (len(self.rows) * R, 0) == (M, N % C)
        assert max(max(row) for row in self.rows) < N // C
        self.sizes = (M, N, R, C, head_dim)

    def run(self, q, k, v):
        tokens, length, row, size, dim = self.sizes
        assert (q.shape, k.shape, v.shape) == (
            (tokens, 1, dim), (length, 1, dim), (length, 1, dim),
        )  # fmt: skip
        assert v.is_contiguous()
        out = torch.empty_like(q)
        for number, blocks in enumerate(self.rows):
            places = torch.tensor([b * size + i for b in blocks for i in range(size)])
            mine = slice(number * row, (number + 1) * row)
            scores = q[mine, 0].float() @ k[places, 0].float().T * dim**-0.5
            out[mine, 0] = (scores.softmax(-1) @ v[places, 0].float()).to(q.dtype)
        return out


@pytest.fixture
def flashinfer(monkeypatch):
    """FlashInfer, as if it were installed; its backend `fa2` does not run."""
    module = ModuleType("flashinfer")
    module.BlockSparseAttentionWrapper = NaiveBlockSparse
    module.__version__ = "0.6"
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return module


@pytest.fixture
def no_flashinfer(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)


@pytest.fixture
def graph_clock(monkeypatch):
    """A clock for programs that take turns: 100 us for the first, 1 more for each other.

    Each still has to run. FlexAttention runs uncompiled.
    """
    timed = []

    def graphs_us(programs, rounds):
        timed.append(list(programs))
        for program in programs.values():
            program()
        return {name: [100.0 + i] * rounds for i, name in enumerate(programs)}

    def graph_us(calls, rounds):
        for call in calls:
            call()
        return Spread(5.0, 4.0, 6.0, rounds)

    def flex(scale):
        return lambda q, k, v: flex_attention(q, k, v, scale=scale, enable_gqa=True)

    for name in ("prr_layer", "prr_others", "prr_kernels"):
        module = pytest.importorskip(f"sparda_compile.bench.{name}")
        monkeypatch.setattr(module, "graphs_us", graphs_us)
        if hasattr(module, "graph_us"):
            monkeypatch.setattr(module, "graph_us", graph_us)
        if hasattr(module, "compiled_flex"):
            module._flex.cache_clear()
            monkeypatch.setattr(module, "compiled_flex", flex)
    return timed


def _spread(us, **more):
    return {"median": us, "low": us, "high": us, "runs": 60, **more}


def _row(us, overlap):
    return {
        "scheduled": _spread(us, h2d_bytes=round(4e8 * (1 - overlap))),
        "inline": _spread(1.5 * us, h2d_bytes=1),
        "resident": _spread(0.8 * us, h2d_bytes=0),
        "body": _spread(0.7 * us, h2d_bytes=0),
        "tokens_per_s": 16e6 / us,
        "floor_us": 0.8 * us,
        "inline_over_scheduled": 1.5,
        "scheduled_over_body": 1.429,
        "scheduled_over_floor": 1.25,
    }


_DECODE = [
    {
        "batch_size": 1,
        "max_tokens": 131072,
        "by_overlap": {"0.5": _row(8000.0, 0.5), "0.9": _row(5000.0, 0.9)},
        "skipped": {},
        "baselines": {
            "overlap": 0.9,
            "scheduled": _spread(5000.0),
            "static": _spread(54000.0, relative_difference=0.01),
            "offloaded": _spread(200000.0, agrees=False, repair="none"),
            "offloaded_repaired": _spread(210000.0, agrees=True, repair="wait"),
            "skipped": {},
        },
    },
    {
        "batch_size": 16,
        "max_tokens": 131072,
        "by_overlap": {"0.5": _row(20000.0, 0.5), "0.9": _row(9000.0, 0.9)},
        "skipped": {"dense": "its KV cache needs 64.0 GiB"},
        "baselines": {"overlap": 0.9, "skipped": {"static": "a static cache needs 64.0 GiB"}},
    },
    {
        "batch_size": 64,
        "max_tokens": 131072,
        "by_overlap": {},
        "skipped": {"scheduled": "its KV cache needs 256.0 GiB"},
    },
]


@pytest.fixture
def decode_results():
    """Decode results as they are written, with few numbers; the last has no times."""
    return copy.deepcopy(_DECODE)
