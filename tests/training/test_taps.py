from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.forecast.projection import Projection, to_inputs
from sparda_compile.graph.evaluate import evaluate
from sparda_compile.graph.nodes import call_name, find_ops
from sparda_compile.graph.tags import LAYER
from sparda_compile.module.captures_of import captures_of
from sparda_compile.program.plan import forecast_shapes, make_plan
from sparda_compile.testing import build
from sparda_compile.testing.building import build_from_transformers
from sparda_compile.training.taps import tap_forward

CONFIG = SpardaConfig(
    block_size=16, pool_size=8, pool_stride=4, local_blocks=1, top_k=3, lowering="eager"
)
# Plain; query norms and windows; learned positions, one fused projection and eager scores.
FAMILIES = [("llama", None), ("llama", 8), ("gemma3", None), ("gpt2", None)]


def heard(forward, ids, weights, positions=None):
    """Return what the taps hear: {layer: (forecast, query, keys)}."""
    found = {}
    if positions is None:
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
    forward(ids, positions, weights, lambda site, *tensors: found.update({site.layer: tensors}))
    return found


def draw(shapes):
    generator = torch.Generator().manual_seed(4)
    return {
        layer: Projection(
            tuple(
                (torch.randn(factor, generator=generator) * 0.1).requires_grad_()
                for factor in shape.factors
            )
        )
        for layer, shape in shapes.items()
    }


def decode_plan(captures, config):
    return make_plan(
        captures, "decode", config, batch_size=1, max_tokens=256,
    )  # fmt: skip


def deployed_forecasts(plan, token, position, weights, layers):
    """Compute the Forecasts of a decode step from its graph; those that need no cache."""
    graph = plan.stage("insert_forecast").graph
    known, projections = {}, to_inputs(weights)
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        role = plan.captured.inputs.get(node.name)
        if role is not None:
            known[node] = torch.tensor([[token if role == "input_ids" else position]])
        elif node.name in plan.captured.weights:
            known[node] = plan.captured.weights[node.name].detach()
        elif node.name in projections:
            known[node] = projections[node.name].detach()
    scores = {LAYER.of(n): n.args[0] for n in find_ops(graph, "score_blocks")}
    with torch.no_grad():
        return {layer: evaluate(scores[layer], known, {}, 1) for layer in layers}


@pytest.mark.parametrize(("family", "rank"), FAMILIES)
def test_a_forecast_is_bit_for_bit_the_deployed_one(gym, family, rank):
    config = CONFIG.replace(forecast_rank=rank)
    attention = "eager" if family == "gpt2" else "sdpa"
    is_shared = family == "llama"
    model = gym.model if is_shared else build(family, attn_implementation=attention)
    captures = gym.captures if is_shared else captures_of(model)
    plan = decode_plan(captures, config)
    forward = tap_forward(captures, config, 1)
    assert {shape.rank for shape in forward.shapes.values()} == {rank}
    assert forward.shapes == forecast_shapes(plan)
    weights = draw(forward.shapes)
    # What layers 0 and 1 forecast by depends on the token alone; one token, so that the matrix
    # products have the same shapes.
    layers = [layer for layer in forward.shapes if layer < 2]
    want = deployed_forecasts(plan, 77, 123, weights, layers)
    found = heard(forward, torch.tensor([[77]]), weights, torch.tensor([[123]]))
    for layer in layers:
        assert torch.equal(found[layer][0], want[layer])
        assert want[layer].any()


def test_the_model_computes_what_it_did():
    """The keys of the last layer depend on every attention before it, windows included."""
    model = build("gemma3", seed=3)
    captures = captures_of(model)
    forward = tap_forward(captures, CONFIG, 2)
    ids = torch.randint(0, 256, (2, 90))
    found = heard(forward, ids, draw(forward.shapes))
    last = forward.sites[-1]
    seen = []
    module = model.get_submodule(last.module)
    module.k_proj.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model(ids)
    keys = seen[0].unflatten(-1, (last.num_groups, last.head_dim)).transpose(1, 2)
    if hasattr(module, "k_norm"):
        keys = module.k_norm(keys)
    # A rotation keeps the length of a head.
    lengths = found[last.layer][2].norm(dim=-1)
    torch.testing.assert_close(lengths, keys.norm(dim=-1), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def forward(gym):
    return tap_forward(gym.captures, gym.config, 1)


def test_only_projections_get_a_gradient(gym, forward):
    weights = draw(forward.shapes)
    (ids,) = gym.batches(1)
    for forecast, query, keys in heard(forward, ids, weights).values():
        assert forecast.requires_grad
        assert not query.requires_grad
        assert not keys.requires_grad
        forecast.sum().backward()
    assert all(weight.grad.any() for weight in to_inputs(weights).values())
    assert all(p.grad is None for p in gym.model.parameters())


def test_nothing_behind_the_last_tap_is_run(forward):
    graph = forward.graph_module.graph
    nodes = list(graph.nodes)
    taps = [n for n in nodes if n.op == "call_module"]
    assert [n.target for n in taps] == ["sparda_tap_0", "sparda_tap_1"]
    assert nodes.index(taps[-1]) == len(nodes) - 2
    names = [call_name(n) for n in nodes]
    assert names.count("causal_attention") == 1
    assert "scaled_dot_product_attention" not in names
    assert not find_ops(graph, "kv_update")


def test_without_a_listener_the_backbone_runs_alone(gym, forward):
    (ids,) = gym.batches(1)
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    heard(forward, ids, draw(forward.shapes))
    forward(ids, positions, draw(forward.shapes), None)
    assert all(tap.listener is None for tap in forward.taps)


def test_model_with_windows_alone_is_refused(gym):
    fields = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 24,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    mistral = build_from_transformers(
        "MistralForCausalLM", "MistralConfig", fields, seed=0, attn_implementation="sdpa"
    )
    captures = captures_of(mistral)
    with pytest.raises(UnsupportedInputError, match=r"sliding window in every attention.*dense"):
        tap_forward(captures, gym.config, 1)
