from __future__ import annotations

import pytest
import torch

from sparda_compile.testing import (
    build,
    random_forecast,
    reference,
    reference_decode,
    tiny_llama,
    tiny_nosa,
)
from sparda_compile.testing.reference_scores import Rules

SMALL = {"block_size": 16, "pool_size": 16, "pool_stride": 16, "sink_blocks": 1, "local_blocks": 1}
SELECTIONS = [("query", "infllm2"), ("query", "quest"), ("forecast", "infllm2")]


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(0, 256, (1, 230), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("name", "seed"),
    [("llama", 0), ("llama", 1), ("llama", 2), ("qwen2", 1), ("qwen3", 1), ("mistral", 2)],
)
def test_dense_equals_generate(name, seed, prompt):
    model = build(name, seed)
    out = model.generate(
        prompt,
        max_new_tokens=100,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens, logits = reference_decode(model, prompt, 100, mode="dense", block_size=16)
    assert tokens == out.sequences[0, prompt.shape[1] :].tolist()
    torch.testing.assert_close(torch.stack(logits), torch.cat(out.logits), rtol=0, atol=2e-4)


def test_retention_and_its_selector_go_together(llama):
    prompt, nosa = list(range(60)), tiny_nosa()
    out = nosa.generate(
        torch.tensor([prompt]), max_new_tokens=5, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    tokens, logits = reference_decode(nosa, prompt, 5, mode="dense", block_size=16)
    assert tokens == out.sequences[0, 60:].tolist()
    torch.testing.assert_close(torch.stack(logits), torch.cat(out.logits), rtol=0, atol=2e-4)
    for model, selector in ((llama, "nosa"), (nosa, "infllm2")):
        with pytest.raises(ValueError, match=f"selector='{selector}' does not go with"):
            reference_decode(model, prompt, 1, mode="query", selector=selector)


@pytest.mark.parametrize(("mode", "selector"), SELECTIONS)
@pytest.mark.parametrize("top_k", [None, 1000])
def test_full_budget_equals_dense_bit_for_bit(llama, prompt, mode, selector, top_k):
    forecast = random_forecast(llama)
    tokens, logits = reference_decode(
        llama, prompt, 20, mode=mode, selector=selector, top_k=top_k, forecast=forecast, **SMALL
    )
    dense_tokens, dense_logits = reference_decode(llama, prompt, 20, mode="dense", **SMALL)
    assert tokens == dense_tokens
    assert torch.equal(torch.stack(logits), torch.stack(dense_logits))


@pytest.mark.parametrize(("mode", "selector"), SELECTIONS)
def test_small_budget_changes_the_outcome(llama, prompt, mode, selector):
    forecast, trace = random_forecast(llama), []
    tokens, _ = reference_decode(
        llama,
        prompt,
        40,
        mode=mode,
        selector=selector,
        top_k=2,
        forecast=forecast,
        trace=trace,
        **SMALL,
    )
    dense_tokens, _ = reference_decode(llama, prompt, 40, mode="dense", block_size=16)
    assert tokens[0] == dense_tokens[0]
    assert tokens != dense_tokens
    assert len(trace) == 39
    for step, layers in enumerate(trace):
        current = (prompt.shape[1] + step) // 16
        assert len(layers) == 2
        for ids in (ids for groups in layers for ids in groups):
            assert len(ids) == 1 + 1 + 1 + 2
            assert ids == sorted(set(ids))
            assert {0, current - 1, current} <= set(ids)
    chosen = {tuple(ids) for layers in trace for groups in layers for ids in groups}
    assert len(chosen) > 10


def test_exact_is_query(llama, prompt):
    query = reference_decode(llama, prompt, 10, mode="query", top_k=1, **SMALL)[0]
    assert reference_decode(llama, prompt, 10, mode="exact", top_k=1, **SMALL)[0] == query


def test_prompt_may_be_a_list_and_shorter_than_a_window(llama):
    dense = reference_decode(llama, [3, 1, 4], 24, mode="dense")[0]
    for mode, selector in SELECTIONS:
        forecast = random_forecast(llama)
        tokens, _ = reference_decode(
            llama, [3, 1, 4], 24, mode=mode, selector=selector, top_k=4, forecast=forecast, **SMALL
        )
        assert tokens == dense


def test_unknown_models_and_a_missing_forecast_are_refused(llama):
    with pytest.raises(ValueError, match="Gemma3"):
        reference_decode(build("gemma3"), [1, 2], 1)
    with pytest.raises(ValueError, match="forecast"):
        reference_decode(llama, [1, 2], 1, mode="forecast")


def rules(**changes):
    defaults = {
        "mode": "query",
        "selector": "infllm2",
        "top_k": 1,
        "sink_blocks": 0,
        "local_blocks": 0,
        "block_size": 64,
        "pool_size": 32,
        "pool_stride": 16,
    }
    return Rules(**{**defaults, **changes})


def test_ties_and_missing_scores_go_to_the_lower_id():
    keys = [torch.zeros(4) for _ in range(300)]
    q_RD = torch.ones(2, 4)
    for selector in ("infllm2", "quest", "lowbit2"):
        ids = reference._select(q_RD, None, 0.5, keys, 300, rules(selector=selector, top_k=2))
        assert ids == [0, 1, 4]
    short = reference._select(q_RD, None, 0.5, keys[:20], 20, rules(block_size=16, top_k=1))
    assert short == [0, 1]


def test_forced_blocks_overlap_without_costing_budget():
    keys = [torch.zeros(4) for _ in range(100)]
    q_RD = torch.ones(1, 4)
    ids = reference._select(
        q_RD, None, 0.5, keys, 100, rules(block_size=16, sink_blocks=6, local_blocks=2, top_k=0)
    )
    assert ids == [0, 1, 2, 3, 4, 5, 6]


def test_forecast_selects_by_the_layer_before(llama):
    forecast = random_forecast(llama, seed=1)
    before = torch.get_rng_state()
    assert forecast.keys() == {"bootstrap", 0}
    assert forecast[0].shape == (2 * 16, 64)
    assert torch.equal(torch.get_rng_state(), before)
    prompt = list(range(120))
    traces = []
    for changed in (None, "bootstrap", 0):
        weights = {name: -w if name == changed else w for name, w in forecast.items()}
        trace = []
        reference_decode(
            llama, prompt, 2, mode="forecast", top_k=1, forecast=weights, trace=trace, **SMALL
        )
        traces.append(trace[0])
    base, other_bootstrap, other_layer = traces
    assert base[0] != other_bootstrap[0]
    assert base[0] == other_layer[0]
    assert base[1] != other_layer[1]


@pytest.mark.parametrize(("mode", "selector"), SELECTIONS)
@pytest.mark.parametrize(("block_size", "pool_size"), [(64, 32), (16, 16), (32, 64)])
@torch.no_grad()
def test_first_selection_equals_a_vectorized_one(llama, mode, selector, block_size, pool_size):
    """Compare with tensors that transformers computes, on what no earlier selection touched."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    prompt = torch.randint(0, 256, (1, 401), generator=torch.Generator().manual_seed(3))
    position = prompt.shape[1]
    forecast, trace = random_forecast(llama, seed=2), []
    tokens, _ = reference_decode(
        llama,
        prompt,
        2,
        mode=mode,
        selector=selector,
        top_k=2,
        sink_blocks=1,
        local_blocks=1,
        block_size=block_size,
        pool_size=pool_size,
        pool_stride=16,
        forecast=forecast,
        trace=trace,
    )
    inputs = []
    hooks = [
        layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for layer in llama.model.layers
    ]
    llama(torch.cat([prompt, torch.tensor([tokens[:1]])], dim=1))
    for hook in hooks:
        hook.remove()
    cos, sin = llama.model.rotary_emb(inputs[0], torch.arange(position + 1).unsqueeze(0))

    def rotated(x, num_heads):
        x = x.unflatten(-1, (num_heads, 16)).transpose(1, 2)
        return apply_rotary_pos_emb(x, x, cos, sin)[0][0]

    # Layer 1's own query already depends on what layer 0 selected.
    for layer_id in range(2 if mode == "forecast" else 1):
        attention = llama.model.layers[layer_id].self_attn
        k_GSD = rotated(attention.k_proj(inputs[layer_id]), 2)[:, :position]
        pooled_GWD = k_GSD.unfold(1, pool_size, 16).mean(-1)
        if mode == "forecast":
            weight = forecast["bootstrap"] if layer_id == 0 else forecast[layer_id - 1]
            f_GD = rotated(inputs[max(layer_id - 1, 0)] @ weight.T, 2)[:, -1]
            windows_GW = torch.einsum("gd,gwd->gw", f_GD, pooled_GWD)
        else:
            q_GRD = rotated(attention.q_proj(inputs[layer_id]), 4)[:, -1].unflatten(0, (2, 2))
            logits_GRW = torch.einsum("grd,gwd->grw", q_GRD, pooled_GWD) / 4
            windows_GW = logits_GRW.softmax(-1).sum(1)
        current = position // block_size
        starts = torch.arange(windows_GW.shape[1]) * 16
        for group in range(2):
            scores = []
            for m in range(1, current - 1):
                if selector == "quest":
                    block = k_GSD[group, m * block_size : (m + 1) * block_size]
                    query = q_GRD[group].mean(0)
                    bound = torch.where(query > 0, block.amax(0), block.amin(0)) @ query
                    scores.append(bound.item())
                else:
                    touches = (starts < (m + 1) * block_size) & (
                        starts + pool_size > m * block_size
                    )
                    scores.append(windows_GW[group][touches].max().item())
            best = sorted(range(len(scores)), key=lambda i: -scores[i])[:2]
            want = sorted({0, current - 1, current} | {i + 1 for i in best})
            assert trace[0][layer_id][group] == want


def test_short_list_goes_first_and_worth_fills_the_rest():
    """Keys rise along the sequence and worths fall, so each part picks at its own end."""
    keys = [torch.full((4,), t / 100) for t in range(300)]
    worths = [torch.tensor(-t / 100) for t in range(300)]
    q_RD = torch.ones(2, 4)
    for short_list, want in ((0, [0, 1, 2, 4]), (1, [0, 1, 3, 4]), (3, [1, 2, 3, 4])):
        nosa = rules(selector="nosa", top_k=3, short_list=short_list)
        assert reference._select(q_RD, None, 0.5, keys, 300, nosa, worths) == want
