"""A capture that fails says why and where, and leaves the GPU as it was."""

from __future__ import annotations

import contextlib
import gc
import types
import weakref

import pytest
import torch
from torch import nn

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import CudaGraphError, KVCacheError, RankLostError
from sparda_compile.isa.engines import CudaEngine
from sparda_compile.program.graph_capture import capture, place_of
from sparda_compile.program.program import Program
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.testing import tiny_llama

POOL = (0, 3)
SMALL = {"mode": "query", "block_size": 16, "top_k": 2, "max_tokens": 256, "machine": "h200"}


@torch.library.custom_op("sparda_tests::scaled_by_host", mutates_args=())
def scaled_by_host(x: torch.Tensor) -> torch.Tensor:
    """Multiply by a number that the CPU asks for."""
    return x * (1.0 + 0.0 * x.flatten()[0].item())


@scaled_by_host.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Scaled(nn.Module):
    """A module around another one, whose result passes through the CPU's hands."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return scaled_by_host(self.inner(x))


def scaled_llama():
    model = tiny_llama()
    model.model.layers[1].mlp = Scaled(model.model.layers[1].mlp)
    return model


class Cuda:
    """Stands for torch.cuda, and for what torch leaves behind of a capture that failed."""

    def __init__(self, monkeypatch, *, is_invalid=True, keeps_random=False):
        self.stream = self.outer = types.SimpleNamespace(device=torch.device("cpu", 0))
        self.inner = object()
        self.pools, self.generator = [], torch.Generator()
        self.done = []
        self.is_invalid, self.keeps_random = is_invalid, keeps_random
        for name in ("CUDAGraph", "graph", "current_stream", "set_stream", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "default_generators", (self,))
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, getattr(self, name))

    def _CUDAGraph(self):  # noqa: N802
        return object()

    @contextlib.contextmanager
    def _graph(self, graph, pool, **_):
        self.stream = self.inner
        self.pools.append(pool)
        try:
            yield
        finally:
            if self.is_invalid:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.pools.remove(pool)
            self.stream = self.outer

    def _current_stream(self):
        return self.stream

    def _set_stream(self, stream):
        self.stream = stream

    def _graph_pool_handle(self):
        return POOL

    def _cuda_endAllocateToPool(self, index, pool):  # noqa: N802
        assert index == 0
        if pool not in self.pools:
            raise RuntimeError("not currently recording to mempool_id")
        self.pools.remove(pool)
        self.done.append("end")

    def _cuda_releasePool(self, index, pool):  # noqa: N802
        assert (index, pool) == (0, POOL)
        self.done.append("release")

    # Of a generator.
    def get_state(self):
        return self.generator.get_state()

    def set_state(self, state):
        self.generator.set_state(state)

    def clone_state(self):
        return self.generator.clone_state()

    def graphsafe_set_state(self, state):
        self.done.append("generator")
        self.keeps_random = False
        self.generator = state


@pytest.fixture
def cuda(monkeypatch):
    """Replace torch.cuda by one whose captures fail as they do on a GPU."""
    fake = Cuda(monkeypatch)
    real = torch.Tensor.uniform_

    def uniform(tensor, *, generator):
        if fake.keeps_random:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        return real(tensor, generator=generator.generator)

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    return fake


class Waits:
    """Fails as an op that waits for the CPU does, with a tensor of the pool in its hands."""

    def __init__(self, error):
        self.error = error
        self.held = None

    def __call__(self):
        logits = torch.zeros(3)
        self.held = weakref.ref(logits)
        raise self.error


NOT_PERMITTED = "\nCUDA error: operation not permitted when stream is capturing\nSearch for it"


def test_a_failed_capture_is_a_sentence(cuda):
    with pytest.raises(CudaGraphError) as caught:
        capture(Waits(RuntimeError(NOT_PERMITTED)), None, lambda: " of the decode, in x")
    said = str(caught.value)
    assert said.startswith(
        "no CUDA graph could be captured of the decode, in x. torch says: RuntimeError: "
        "CUDA error: operation not permitted when stream is capturing. A graph"
    )
    for part in (".item()", "not pinned", "cuda_graph=False"):
        assert part in said
    assert "\n" not in said
    # Why it failed, and not that a failed capture cannot be ended.
    assert str(caught.value.__cause__) == NOT_PERMITTED


@pytest.mark.parametrize("keeps_random", [False, True])
def test_nothing_of_it_is_left(cuda, keeps_random):
    cuda.keeps_random = keeps_random
    before = cuda.generator.get_state()
    function = Waits(RuntimeError(NOT_PERMITTED))
    with pytest.raises(CudaGraphError) as caught:
        capture(function, None, str)
    assert cuda.stream is cuda.outer
    assert cuda.done == ["end", "release", *(["generator"] * keeps_random)]
    assert torch.equal(cuda.generator.get_state(), before)
    # Whoever keeps the error keeps no memory of the graph.
    assert caught.value.__cause__.__traceback__ is not None
    assert function.held() is None


def test_what_torch_has_given_back_is_not_given_back_again(cuda):
    cuda.is_invalid = False
    with pytest.raises(CudaGraphError):
        capture(Waits(RuntimeError(NOT_PERMITTED)), None, str)
    assert cuda.done == []
    assert cuda.stream is cuda.outer


@pytest.mark.parametrize(
    "error", [RankLostError("gone"), torch.OutOfMemoryError("no memory"), KeyboardInterrupt()]
)
def test_what_says_itself_what_to_do_passes(cuda, error):
    with pytest.raises(type(error)) as caught:
        capture(Waits(error), None, str)
    assert caught.value is error
    assert cuda.stream is cuda.outer
    assert cuda.done == ["end", "release"]


def test_a_failure_of_the_end_alone_is_a_sentence_too(cuda):
    with pytest.raises(CudaGraphError, match="torch says: RuntimeError: operation failed due to"):
        capture(lambda: torch.zeros(1), None, str)
    assert cuda.done == ["end", "release"]


@pytest.fixture(scope="module")
def scaled():
    return optimize(scaled_llama(), SpardaConfig(**SMALL, lowering="eager"))


def calls_of(scaled):
    program = Program(scaled.programs.latest_plan("decode"), {})
    return program, program.lowered.calls


def test_a_piece_names_the_ops_of_other_packages_and_their_lines(scaled):
    _, calls = calls_of(scaled)
    said = [place_of(call) for call in calls if call.piece is not None]
    named = [text for text in said if "scaled_by_host" in text]
    assert len(named) == 1
    assert ", which calls sparda_tests.scaled_by_host (model.layers.1.mlp: File " in named[0]
    assert f'{__file__}", line ' in named[0]
    others = [text for text in said if text not in named]
    assert all(" from " in text and " to " in text and "modeling_llama" in text for text in others)


def test_an_op_of_ours_is_named_with_its_layer(scaled):
    _, calls = calls_of(scaled)
    call = next(call for call in calls if call.name == "sparse_attention_1")
    assert place_of(call).startswith(
        ", in sparse_attention_1, sparda.sparse_attention (model.layers.1.self_attn: File "
    )
    assert place_of(None) == ""


def test_a_program_knows_the_call_that_failed(scaled, monkeypatch):
    program, calls = calls_of(scaled)
    failing = next(call for call in calls if "scaled_by_host" in place_of(call))

    def fail(*_):
        raise RuntimeError(NOT_PERMITTED)

    monkeypatch.setattr(failing, "function", fail)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    kv = KVCache(program.plan.layout, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="not permitted"):
        program(ids, ids, None, kv)
    assert program.lowered.failed is failing
    assert program._failed_in() == f" of the decode{place_of(failing)}"
    assert program._failed_in() == " of the decode"


@pytest.mark.gpu
def test_an_engine_forgets_what_was_captured():
    engine = CudaEngine(torch.device("cuda"))
    engine.submit(1, lambda: None)
    assert any(engine._news.values())
    engine.forget()
    assert not any(engine._news.values())


def pools():
    """Return the pools of GPU memory that hold any, and the common one."""
    gc.collect()
    torch.cuda.empty_cache()
    return {(0, 0)} | {tuple(part["segment_pool_id"]) for part in torch.cuda.memory_snapshot()}


@pytest.mark.gpu
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_model_that_waits_for_the_cpu_on_a_gpu(lowering):
    """The second token is refused with the line; then all goes on as if it had never been."""
    model = scaled_llama().cuda()
    config = SpardaConfig(**SMALL, lowering=lowering)
    fast = optimize(model, config)
    ids = torch.arange(2, 70, device="cuda")[None]
    token = ids[:, :1]
    # What cuBLAS takes in the first capture of all stays in the pool of that one.
    ones = torch.ones(8, 8, device="cuda")
    assert torch.equal(ones @ ones, 8 * ones)  # it may not begin within a capture
    capture(lambda: ones @ ones, None, str)
    stream, before = torch.cuda.current_stream(), pools()
    for _ in range(2):  # the second cache is refused as the first was
        cache = fast(ids).past_key_values
        fast(token, past_key_values=cache)
        with pytest.raises(CudaGraphError) as caught:
            fast(token, past_key_values=cache)
        said = str(caught.value)
        assert "of the decode, in piece_" in said
        assert "sparda_tests.scaled_by_host (model.layers.1.mlp: File " in said
        assert "capturing" in said
        assert torch.cuda.current_stream() == stream
        assert not torch.cuda.is_current_stream_capturing()
        with pytest.raises(KVCacheError, match="began and did not end"):
            fast(token, past_key_values=cache)
        cache.reset()
    # Random numbers outside of a capture.
    torch.manual_seed(1)
    first = torch.rand(4, device="cuda")
    torch.manual_seed(1)
    assert torch.equal(torch.rand(4, device="cuda"), first)
    del cache, caught
    assert pools() <= before
    # Without graphs the same model runs, and another model is captured.
    plain = optimize(model, config.replace(cuda_graph=False))
    want = plain.generate(ids, max_new_tokens=8, do_sample=True)
    assert want.shape == (1, ids.shape[1] + 8)
    other = optimize(tiny_llama().cuda(), config)
    other.generate(ids, max_new_tokens=8)
    max_tokens = other.last_cache.layout.max_tokens
    assert other.programs.get("decode", 1, max_tokens, last_only=True).num_graphs == 1
