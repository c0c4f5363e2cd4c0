"""Forecasts with several heads for each KV head: where they start, what they select, their file."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from sparda_compile import SpardaConfig, explain, optimize, train_forecast
from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.decode import decode
from sparda_compile.evaluation.reading import read
from sparda_compile.forecast.projection import from_tensors
from sparda_compile.forecast.weights import ForecastWeights, load_forecast
from sparda_compile.graph.nodes import find_ops, tensor_shape
from sparda_compile.testing import tiny_llama, tiny_nosa

SMALL = {
    "block_size": 16, "pool_size": 8, "pool_stride": 4, "local_blocks": 1, "top_k": 2,
    "lowering": "eager", "max_tokens": 256, "prefill": "dense", "machine": "h200",
}  # fmt: skip
SELECTORS = ("infllm2", "quest", "lowbit2", "lowbit4")
HEADS, GROUPS = 8, 2


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=16)


@pytest.fixture(scope="module")
def traced(model):
    return optimize(model, SpardaConfig(**{**SMALL, "mode": "query"}))


def made(traced, forecast=None, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a Forecast that nobody has trained
        return optimize(traced, SpardaConfig(**{**SMALL, **settings}), forecast=forecast)


def prompt(length=180):
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(1))


def logits_of(module):
    out = module.generate(
        prompt().to(module.device), max_new_tokens=20, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.cat(out.logits)


def started(traced, heads, **settings):
    """Return the projections that training starts from."""
    module = made(traced, mode="forecast", forecast_heads=heads, **settings)
    return ForecastWeights(from_tensors(dict(module.sparda_forecast)))


@pytest.mark.parametrize("selector", SELECTORS)
def test_as_many_as_query_heads_start_as_next_query(model, traced, selector):
    config = {"selector": selector, "offload": "always"}
    weights = started(traced, HEADS // GROUPS, selector=selector)
    for number, layer in enumerate(model.model.layers):
        rows = layer.self_attn.q_proj.weight
        torch.testing.assert_close(weights[number], rows.detach(), rtol=0.0, atol=1e-6)
    decided = SpardaConfig(**{**SMALL, **config, "forecast_heads": 4, "mode": "query"})
    decoded = decode(model, read(model, prompt()), prompt(20), decided, forecast=weights)
    for step in decoded.records:
        for record in step[1:]:
            assert torch.equal(record.chosen["forecast"], record.chosen["next_query"])
        assert torch.equal(step[0].chosen["forecast"], step[0].chosen["query"])
    found = []
    for hint in ({"hint": "forecast", "forecast_heads": 4}, {"hint": "next_query"}):
        module = made(traced, mode="exact", **config, **hint)
        logits = logits_of(module)
        found.append((logits, module.sparda.stats().layers[1]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert found[0][1].h2d_bytes > 0


@pytest.mark.parametrize("heads", [1, 2])
def test_fewer_start_as_means_of_neighbours(model, traced, heads):
    weights = started(traced, heads)
    for number, layer in enumerate(model.model.layers):
        rows = layer.self_attn.q_proj.weight.detach().view(GROUPS, heads, -1, 16, 64)
        want = rows.mean(2).reshape(GROUPS * heads * 16, 64)
        torch.testing.assert_close(weights[number], want, rtol=0.0, atol=1e-6)


def test_groups_of_one_query_head_have_one():
    model = tiny_llama(num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    config = SpardaConfig(**{**SMALL, "mode": "forecast", "forecast_heads": 1})
    with pytest.warns(UserWarning, match="not trained"):
        fast = optimize(model, config)
    assert fast.generate(prompt(), max_new_tokens=2).shape == (1, 182)
    words = (
        r"forecast_heads=2 does not fit layer 0, where one query head has each KV head: .* use 1\."
    )
    with pytest.raises(ConfigError, match=words):
        explain(model, config.replace(forecast_heads=2))


def test_one_head_is_what_none_is(traced):
    graphs = []
    for heads in (None, 1):
        module = made(traced, mode="forecast", forecast_heads=heads)
        plan = module.programs.get("decode", 1, 256, last_only=True).plan
        graphs.append(str(plan.graph_module.graph))
    assert graphs[0] == graphs[1]


def test_a_number_that_does_not_divide_is_refused_by_name(model):
    config = SpardaConfig(**{**SMALL, "mode": "forecast", "forecast_heads": 3})
    words = r"forecast_heads=3 does not fit layer 0, where 4 query .* use 1 or 2 or 4\."
    with pytest.raises(ConfigError, match=words):
        explain(model, config)


@pytest.mark.parametrize("selector", SELECTORS)
def test_the_selector_itself_scores_several(traced, selector):
    module = made(traced, mode="forecast", forecast_heads=2, selector=selector)
    plan = module.programs.get("decode", 1, 256, last_only=True).plan
    scores = find_ops(plan.stage("insert_forecast").graph, "score_blocks")
    assert len(scores) == 2
    for node in scores:
        assert selector in node.args
        assert tensor_shape(node.args[0])[1:] == (2 * GROUPS, 1, 16)


@pytest.mark.parametrize("mode", ["forecast", "exact"])
@pytest.mark.parametrize("selector", ["infllm2", "lowbit2"])
def test_where_blocks_are_kept_changes_nothing(traced, selector, mode):
    found = [
        logits_of(made(traced, mode=mode, forecast_heads=2, selector=selector, offload=offload))
        for offload in ("never", "always")
    ]
    assert torch.equal(*found)
    if mode == "forecast":
        one = logits_of(made(traced, mode=mode, selector=selector, offload="never"))
        assert not torch.equal(found[0], one)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["forecast", "exact"])
@pytest.mark.parametrize("selector", ["infllm2", "lowbit2"])
def test_on_a_gpu_neither(model, traced, selector, mode):
    settings = {"mode": mode, "forecast_heads": 2, "selector": selector}
    on_gpu = copy.deepcopy(model).cuda()
    found = [
        logits_of(made(on_gpu, lowering="inductor", offload=offload, **settings))
        for offload in ("never", "always")
    ]
    assert torch.equal(*found)
    expected = logits_of(made(traced, **settings))
    torch.testing.assert_close(found[0].cpu(), expected, rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("selector", ["infllm2", "lowbit2"])
def test_a_sparse_prompt_selects_as_steps_at_its_positions_do(traced, selector):
    settings = {"mode": "forecast", "forecast_heads": 4, "selector": selector, "prefill": "sparse"}
    found = []
    for offload, is_turn in (("never", True), ("always", True), ("always", False)):
        module = made(traced, offload=offload, **settings)
        cache = module.new_cache(256)
        module(prompt()[:, :150], past_key_values=cache)
        parts = prompt()[:, 150:].split(30 if is_turn else 1, dim=1)
        found += [[module(ids, past_key_values=cache).logits[0, -1] for ids in parts][-1]]
    torch.testing.assert_close(found[0], found[1], rtol=0.0, atol=1e-5)
    torch.testing.assert_close(found[1], found[2], rtol=0.0, atol=1e-4)


def test_a_prompt_by_another_selector_scores_all_heads_too(traced):
    settings = {"mode": "forecast", "forecast_heads": 2, "selector": "lowbit2"}
    module = made(traced, prefill="sparse", prefill_selector="infllm2", **settings)
    assert module.generate(prompt(), max_new_tokens=2).shape == (1, 182)
    assert module.programs.config.forecast_selector == "lowbit2"


def test_a_model_that_selects_by_retention_takes_several():
    model = tiny_nosa()
    config = {**SMALL, "mode": "forecast", "selector": "nosa", "short_list": 1}
    with pytest.warns(UserWarning, match="not trained"):
        fast = optimize(model, SpardaConfig(**config, forecast_heads=2))
    assert fast.generate(prompt(), max_new_tokens=3).shape == (1, 183)


def test_a_file_says_how_many_it_has(traced, tmp_path):
    path = tmp_path / "forecast.safetensors"
    config = SpardaConfig(**{**SMALL, "selector": "lowbit2", "forecast_heads": 4})
    trained = train_forecast(traced, [prompt()], config=config, steps=1, out=path, progress=False)
    assert (trained.info.heads, trained.info.groups) == (4, (2, 2))
    assert load_forecast(path).info.heads == 4
    followed = SpardaConfig(**{**SMALL, "selector": "lowbit2", "mode": "forecast"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = optimize(traced, followed, forecast=path)
    assert module.sparda_config.forecast_heads == 4
    assert all(torch.equal(module.sparda_forecast[str(n)], trained[n]) for n in (0, 1))
    assert module.generate(prompt(), max_new_tokens=3).shape == (1, 183)
    words = "have 4 heads for each KV head, but this configuration has forecast_heads=2"
    with pytest.raises(ConfigError, match=words):
        optimize(traced, followed.replace(forecast_heads=2), forecast=path)
    with pytest.warns(UserWarning, match=r"selector=infllm2 \(trained with lowbit2\)"):
        optimize(traced, followed.replace(selector="infllm2"), forecast=path)
