from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparda_compile import SpardaConfig, explain, optimize
from sparda_compile.capture.causal_lm import as_causal_lm
from sparda_compile.capture.forward import CapturedGraph, capture, kv_update, share_weights
from sparda_compile.errors import CaptureError
from sparda_compile.graph.fake_runner import leaves_of
from sparda_compile.graph.nodes import call_name, fake_value, find_ops
from sparda_compile.sizes import BATCH_SIZE, NUM_TOKENS, SAMPLES, size_of
from sparda_compile.testing import PlainCausalLM, build, tiny_llama

PHASES = ("prefill", "decode")


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="module")
def captured(llama: nn.Module) -> dict[str, CapturedGraph]:
    return {phase: capture(llama, phase, last_logits_only=True) for phase in PHASES}


def placeholders(graph_module: Any) -> list[Any]:
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]


@pytest.mark.parametrize("op", [kv_update, torch.ops.sparda.kv_update])
def test_marker_raises_when_it_is_run(op: Any) -> None:
    k = torch.zeros(1, 2, 3, 4)
    with pytest.raises(CaptureError, match=r"layer=7.*layer 7 was not rewritten"):
        op(k, k, 7)


def test_marker_returns_shapes_alone_when_traced() -> None:
    with FakeTensorMode():
        k, v = torch.empty(2, 3, 5, 4), torch.empty(2, 3, 5, 4, dtype=torch.float16)
        new_k, new_v = torch.ops.sparda.kv_update(k, v, 0)
    assert (new_k.shape, new_k.dtype) == (k.shape, torch.float32)
    assert (new_v.shape, new_v.dtype) == (v.shape, torch.float16)
    assert new_k is not k


@pytest.mark.parametrize("phase", PHASES)
def test_graph_holds_one_marker_for_each_layer_and_no_other_state(
    llama: nn.Module, phase: str
) -> None:
    graph = capture(llama, phase, last_logits_only=True)
    markers = find_ops(graph.graph_module.graph, "kv_update")
    assert [node.args[2] for node in markers] == [0, 1]
    assert set(graph.inputs.values()) == {"input_ids", "position_ids"}
    own = {tensor.data_ptr() for tensor in (*llama.parameters(), *llama.buffers())}
    assert {weight.data_ptr() for weight in graph.weights.values()} <= own
    assert {id(p) for p in llama.parameters()} <= {id(w) for w in graph.weights.values()}
    sizes = {BATCH_SIZE, NUM_TOKENS} if phase == "prefill" else {BATCH_SIZE}
    named = {*graph.inputs, *sizes, *graph.weights}
    assert {node.name for node in placeholders(graph.graph_module)} == named


def test_weights_may_be_on_the_meta_device() -> None:
    model = tiny_llama().to("meta")
    graph = capture(model, "decode", last_logits_only=True)
    assert all(weight.is_meta for weight in graph.weights.values())
    report = explain(model, SpardaConfig(mode="query", lowering="eager"))
    assert report.error == ""
    assert len(report.sparse_sites) == 2


@pytest.mark.parametrize("phase", PHASES)
def test_every_node_has_a_value_with_samples_for_the_open_sizes(
    llama: nn.Module, phase: str
) -> None:
    gm = capture(llama, phase, last_logits_only=True).graph_module
    inner = [node for node in gm.graph.nodes if node.op != "output"]
    assert all("val" in node.meta for node in inner)
    samples = SAMPLES.of(phase)
    (logits,) = fake_value(next(n for n in gm.graph.nodes if n.op == "output"))
    assert tuple(logits.shape) == (samples.batch, 1, 256)
    ids = next(fake_value(n) for n in placeholders(gm) if n.name == "input_ids")
    assert tuple(ids.shape) == (samples.batch, samples.tokens)


@pytest.mark.parametrize("phase", PHASES)
def test_no_argument_is_a_sample(llama: nn.Module, phase: str) -> None:
    """A graph runs with any numbers: what depends on the open sizes is a node."""
    gm = capture(llama, phase, last_logits_only=True).graph_module
    for node in gm.graph.nodes:
        numbers = [x for x in leaves_of((node.args, node.kwargs)) if type(x) is int]
        assert not [x for x in numbers if size_of(x).is_open], node.format_node()


def test_a_copy_leaves_the_capture_as_it_was(captured: dict[str, CapturedGraph]) -> None:
    before = str(captured["prefill"].graph_module.graph)
    first, second = (captured["prefill"].copy() for _ in range(2))
    first.graph.erase_node(next(n for n in reversed(first.graph.nodes)))
    assert str(captured["prefill"].graph_module.graph) == before == str(second.graph)


@torch.no_grad()
def test_two_captures_compute_every_shape() -> None:
    """A module without a cache has no marker, so its graph can run."""
    module = PlainCausalLM()
    model = as_causal_lm(module)
    for phase, batch_size, num_tokens in [
        ("prefill", 1, 2), ("prefill", 2, 90), ("prefill", 5, 7), ("decode", 1, 1),
        ("decode", 5, 1),
    ]:  # fmt: skip
        graph = capture(model, phase, last_logits_only=True)
        generator = torch.Generator().manual_seed(num_tokens)
        ids = torch.randint(0, 256, (batch_size, num_tokens), generator=generator)
        positions = torch.arange(num_tokens).expand(batch_size, -1) + 3
        values = {"input_ids": ids, "position_ids": positions} | graph.weights
        values |= {BATCH_SIZE: batch_size, NUM_TOKENS: num_tokens}
        gm = graph.copy()
        (logits,) = gm(*(values[node.name] for node in placeholders(gm)))
        torch.testing.assert_close(logits, module(ids, positions)[:, -1:])


def test_all_logits_are_kept_when_asked_for(llama: nn.Module) -> None:
    gm = capture(llama, "prefill", last_logits_only=False).graph_module
    (logits,) = fake_value(next(n for n in gm.graph.nodes if n.op == "output"))
    assert tuple(logits.shape) == (SAMPLES.batch, SAMPLES.tokens, 256)


class Undecided(PlainCausalLM):
    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        logits = super().forward(input_ids, position_ids)
        return logits if logits.sum() > 0 else -logits


class Counting(PlainCausalLM):
    calls = 0

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(input_ids, position_ids)


class Caching(PlainCausalLM):
    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        logits = super().forward(input_ids, position_ids)
        self.last = logits
        return logits


class ByLength(PlainCausalLM):
    """Does something else for longer prompts."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        logits = super().forward(input_ids, position_ids)
        return logits * 2 if input_ids.shape[1] > 20_000 else logits


class ByRoot(PlainCausalLM):
    """Passes on a number that depends on the prompt's length in no simple way."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return super().forward(input_ids, position_ids) * input_ids.shape[1] ** 0.5


class ByCount(PlainCausalLM):
    """Does something else for a single sequence."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        logits = super().forward(input_ids, position_ids)
        return logits * 2 if len(input_ids) == 1 else logits


class Squeezing(PlainCausalLM):
    """Calls what does something else for a single sequence."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return super().forward(input_ids, position_ids).squeeze(0).view(len(input_ids), -1, 256)


@pytest.mark.parametrize(
    ("model_class", "words"),
    [
        (Undecided, "needs the values of a tensor.*test_forward"),
        (Counting, "changes module.calls of its module"),
        (Caching, "changes module.last of its module"),
        (ByLength, "decides by the prompt.s length, with a limit at 20000 tokens .*test_forward"),
        (ByCount, "for another prompt length or number of sequences it calls something else"),
        (Squeezing, "number of sequences it gets tensors of other dimensions"),
        (ByRoot, "for another prompt length or number of sequences it passes"),
    ],
)
def test_what_cannot_be_traced_is_refused_with_its_reason(
    model_class: type[nn.Module], words: str
) -> None:
    config = SpardaConfig(mode="query", lowering="eager")
    wanted = re.escape(model_class.__name__) + ": cannot trace forward as one graph: .*" + words
    model = model_class()
    before = dict(vars(model))
    with pytest.raises(CaptureError, match=wanted):
        optimize(model, config)
    assert vars(model) == before
    assert model_class.__name__ in explain(model_class(), config).error


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_shared_copy_has_the_same_weights_and_leaves_the_model_alone(attn: Any) -> None:
    model = build("llama", attn_implementation=attn)
    ids = torch.arange(9)[None]
    logits, attributes = model(ids).logits, {n: set(vars(m)) for n, m in model.named_modules()}
    shared = share_weights(model)
    assert shared is not model
    assert type(shared) is type(model)
    mine, theirs = dict(model.named_parameters()), dict(shared.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)
    assert torch.equal(shared(ids).logits, logits)
    capture(shared, "decode", last_logits_only=True)
    assert torch.equal(model(ids).logits, logits)
    assert model.config._attn_implementation == shared.config._attn_implementation == attn
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes


def test_buffers_outside_the_state_dict_are_copied() -> None:
    model = tiny_llama()
    shared = share_weights(model)
    name = next(name for name, _ in model.named_buffers() if name not in model.state_dict())
    assert shared.get_buffer(name) is not model.get_buffer(name)
    assert torch.equal(shared.get_buffer(name), model.get_buffer(name))


def test_no_marker_is_left_to_run(llama: nn.Module) -> None:
    fast = optimize(llama, SpardaConfig(mode="query", lowering="eager"))
    for phase in PHASES:
        assert len(find_ops(fast.sparda.graph(phase, after="capture").graph, "kv_update")) == 2
        left = [call_name(node) for node in fast.sparda.graph(phase).graph.nodes]
        assert "sparda.kv_update" not in left
        assert "scaled_dot_product_attention" not in left
