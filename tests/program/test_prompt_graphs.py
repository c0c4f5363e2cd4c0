"""Short prompts: their shapes are rounded, and from the second time on they are replayed."""

from __future__ import annotations

import contextlib
import itertools
import types

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import CudaGraphError
from sparda_compile.program import graph_capture, program, prompt_graphs
from sparda_compile.program.prompt_graphs import PromptGraphs, is_short, num_read, rounded_past
from sparda_compile.testing import build, random_forecast

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("batch", "columns", "want"),
    [
        (1, 1, 64), (1, 63, 64), (1, 64, 64), (1, 65, 128), (1, 1000, 1024), (1, 4096, 4096),
        (1, 4097, 4097), (4, 1000, 1024), (4, 1025, 1025), (64, 65, 65), (5000, 1, 2),
    ],
)  # fmt: skip
def test_columns_of_short_prompts_are_rounded_up(batch, columns, want):
    assert num_read(batch, columns, CUDA) == want


@pytest.mark.parametrize(("columns", "want"), [(1, 2), (2, 2), (65, 65)])
def test_a_cpu_rounds_nothing(columns, want):
    assert num_read(1, columns, CPU) == want
    assert not is_short(1, columns, CPU)


@pytest.mark.parametrize(
    ("past", "want"), [(0, 0), (1, 1), (2, 2), (3, 4), (513, 1000), (1000, 1000)]
)
def test_a_past_is_rounded_up_to_what_the_cache_holds(past, want):
    assert rounded_past(past, 1000) == want


class FakeGraph:
    """Runs what was captured again."""

    capturing = None

    def __init__(self):
        self.work = None

    def replay(self):
        self.work()


@pytest.fixture
def graphs(monkeypatch):
    """Replace CUDA graphs; return PromptGraphs of a function, and what it was called with."""
    python, pools, handles = [], [], itertools.count()

    @contextlib.contextmanager
    def capture(graph, pool, **_):
        pools.append(pool)
        FakeGraph.capturing = graph
        try:
            yield
        finally:
            FakeGraph.capturing = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(handles)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(graph_capture, "_leave", lambda stream, pool: None)

    def double(ids, extra):
        python.append((tuple(ids.shape), extra))
        if extra == WAITS and FakeGraph.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = torch.empty_like(ids)

        def work():
            out.copy_(ids * 2 + extra)

        if FakeGraph.capturing is None:
            work()
        else:
            FakeGraph.capturing.work = work
        return out

    return types.SimpleNamespace(of=PromptGraphs(double), python=python, pools=pools)


# What a function is given that waits for the GPU.
WAITS = -1


class Cache:
    """Stands for a KV cache."""


def read(graphs, kv, value, columns, extra=0, *, fits=True):
    ids = torch.full((1, columns), value)
    out = graphs.of.run(kv, [ids], (extra,), lambda ids: [ids, extra], lambda: fits)
    assert out.tolist() == [[2 * value + extra] * columns]


def test_a_shape_is_captured_the_second_time_and_then_replayed(graphs):
    kv = Cache()
    for value in range(1, 5):
        read(graphs, kv, value, 64)
        assert len(graphs.of) == (value > 1)
    assert len(graphs.python) == 2


def test_other_sizes_and_other_caches_have_graphs_of_their_own(graphs):
    first, second = Cache(), Cache()
    for value in range(3):
        for kv in (first, second):
            read(graphs, kv, value, 64)
            read(graphs, kv, value, 128)
            read(graphs, kv, value, 64, extra=5)
    assert len(graphs.of) == 6
    assert len(graphs.python) == 12
    assert set(graphs.pools) == {(0, 0)}
    del second, kv
    assert len(graphs.of) == 3


def test_a_pool_that_all_graphs_have_left_gets_no_other(graphs):
    for number in range(2):
        kv = Cache()
        for value in range(3):
            read(graphs, kv, value, 64)
        assert graphs.pools == [(0, i) for i in range(number + 1)]
        del kv
        assert len(graphs.of) == 0


def test_a_shape_that_cannot_be_captured_is_refused_each_time_and_holds_up_no_other(graphs):
    kv = Cache()
    read(graphs, kv, 1, 64, WAITS)
    for _ in range(2):
        with pytest.raises(CudaGraphError, match="not permitted when stream is capturing"):
            read(graphs, kv, 1, 64, WAITS)
    for value in range(3):
        read(graphs, kv, value, 64)
    assert len(graphs.of) == 1
    # The pool of a graph that failed is given back, and so no other's.
    assert graphs.pools == [(0, 0), (0, 1), (0, 2)]


def test_what_is_too_large_is_never_captured(graphs):
    kv = Cache()
    for value in range(4):
        read(graphs, kv, value, 64, fits=False)
    assert len(graphs.of) == 0
    assert len(graphs.python) == 4


def test_shapes_that_were_not_read_for_long_are_let_go(graphs):
    kv = Cache()
    for value in range(2):
        read(graphs, kv, value, 1)
    for columns in range(2, 2 + prompt_graphs._MOST_SHAPES):
        read(graphs, kv, 3, columns)
    assert len(graphs.of) == 0
    read(graphs, kv, 4, 1)
    assert graphs.python[-1] == ((1, 1), 0)


RULES = {"block_size": 16, "pool_size": 8, "pool_stride": 4, "local_blocks": 1, "top_k": 2}


def check_rounded(monkeypatch, model, config, forecast=None):
    """Read as on a GPU, but for graphs: lengths around 64, padding within a batch, turns."""
    ids = torch.randint(2, 250, (2, 300), generator=torch.Generator().manual_seed(5))

    traced = optimize(model, config, forecast=forecast)

    def logits():
        fast = optimize(traced, config, forecast=forecast)
        cache, found, begin = fast.new_cache(), [], 0
        for columns in (130, 63, 1, 2, 65):
            mask = torch.ones(2, begin + columns)
            mask[1, :7] = 0
            part = ids[:, begin : begin + columns]
            out = fast(part, attention_mask=mask, past_key_values=cache)
            found.append(out.logits[:, 7:] if not begin else out.logits)
            begin += columns
        assert cache.get_seq_length() == begin
        assert cache.kv.longest == begin
        return torch.cat(found, 1)

    want = logits()
    rounded = []

    def short(batch, columns, device):
        rounded.append(columns)
        return batch * columns <= 4096

    monkeypatch.setattr(prompt_graphs, "is_short", short)
    monkeypatch.setattr(program, "is_short", short)
    got = logits()
    assert 130 in rounded
    assert (got - want).abs().max() < 2e-5 * want.abs().max()


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
@pytest.mark.parametrize("mode", ["query", "forecast", "exact"])
def test_rounded_prompts_and_turns_give_the_same_logits(
    monkeypatch, shared_llama, traced_llama, mode, prefill
):
    weights = random_forecast(shared_llama, seed=1)
    forecast = {0 if key == "bootstrap" else key + 1: w for key, w in weights.items()}
    config = SpardaConfig(
        mode=mode, hint="previous_step", lowering="eager", prefill=prefill, **RULES, max_tokens=512
    )
    check_rounded(monkeypatch, traced_llama, config, forecast if config.needs_forecast else None)


@pytest.mark.parametrize(("name", "mode"), [("llama", "dense"), ("gemma3", "query")])
def test_rounded_prompts_of_dense_layers_and_of_windows(monkeypatch, name, mode):
    config = SpardaConfig(mode=mode, lowering="eager", **RULES, max_tokens=512)
    check_rounded(monkeypatch, build(name), config)
