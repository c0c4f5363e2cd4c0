from __future__ import annotations

import pytest

from sparda_compile.bench.prompt_floor import Rates, fit_law, prompt_floor
from sparda_compile.bench.shapes import SHAPES, ModelShape
from sparda_compile.config import SpardaConfig

RATES = Rates(tflops=1e-12, d2h_gbps=1e-9)  # one FLOP, and one byte, a second
SHAPE = ModelShape(num_layers=3, hidden=8, ffn=5, num_heads=4, num_groups=2, head_dim=2)
SETTINGS = {"block_size": 16, "top_k": 1, "local_blocks": 0, "sink_blocks": 0, "prefill": "sparse"}


def floor(name, tokens, mode="forecast", **fields):
    return prompt_floor(SHAPE, name, SpardaConfig(mode=mode, **SETTINGS, **fields), tokens, RATES)


def keys_read(tokens, most):
    """Return the sum over all tokens, one by one."""
    return sum(min(position + 1, most) for position in range(tokens))


def test_linear_layers_are_those_of_the_model():
    from sparda_compile.bench.shapes import build_model

    torch = pytest.importorskip("torch")
    model = build_model(SHAPES["tiny"], torch.device("cpu"), torch.float32)
    weights = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    config = SpardaConfig()
    found = prompt_floor(SHAPES["tiny"], "dense", config, 10, RATES)
    assert found["linear"] == 2 * (10 * weights + model.lm_head.weight.numel())


@pytest.mark.parametrize("tokens", [5, 32, 33, 100])
def test_attention(tokens):
    heads = SHAPE.num_heads * SHAPE.head_dim
    dense = 4 * heads * SHAPE.num_layers * keys_read(tokens, tokens)
    assert floor("dense", tokens)["attention"] == pytest.approx(dense)
    assert floor("transformers_flash", tokens)["attention"] == pytest.approx(dense)
    # Two blocks of 16: the current one and one by score.
    sparse = 4 * heads * SHAPE.num_layers * keys_read(tokens, 32)
    assert floor("sparse_forecast", tokens)["attention"] == pytest.approx(sparse)


def test_selection_scores_half_of_all_windows_on_average():
    tokens, windows = 64, 64 / 16 / 2
    by_group = 2 * SHAPE.num_groups * SHAPE.head_dim * SHAPE.num_layers * tokens * windows
    assert floor("sparse_forecast", tokens)["select"] == by_group
    by_head = 2 * by_group * SHAPE.num_heads / SHAPE.num_groups
    assert floor("sparse_query", tokens, "query")["select"] == by_head
    assert floor("sparse_query", 32, "query")["select"] == 0  # all blocks are read
    assert floor("dense", tokens)["select"] == 0


HEADS, GROUPS = SHAPE.num_heads * SHAPE.head_dim, SHAPE.num_groups * SHAPE.head_dim


@pytest.mark.parametrize(
    ("mode", "fields", "per_pair"),
    [
        # Each token by its low-bit key, in one pass; windows of 16 in two, for a softmax.
        ("query", {"selector": "lowbit2"}, 2 * HEADS),
        ("query", {"selector": "lowbit4"}, 2 * HEADS),
        ("forecast", {"selector": "lowbit2"}, 2 * GROUPS),
        ("forecast", {"selector": "lowbit2", "forecast_heads": 2}, 2 * 2 * GROUPS),
        ("forecast", {"forecast_heads": 2}, 2 * 2 * 2 * GROUPS / 16),
        ("query", {"selector": "lowbit2", "prefill_selector": "infllm2"}, 2 * 2 * HEADS / 16),
        ("query", {"prefill_selector": "lowbit4"}, 2 * HEADS),
        ("query", {"selector": "lowbit2", "prefill_candidates": 9.0}, 2 * HEADS),
        # The mean query of a group, and two bounds of a block of 16 tokens.
        ("query", {"selector": "quest"}, 2 * 2 * GROUPS / 16),
        ("forecast", {"selector": "quest"}, 2 * GROUPS / 16),
    ],
)
def test_selection_by_others(mode, fields, per_pair):
    tokens = 64
    found = floor(f"sparse_{mode}", tokens, mode, **fields)
    assert found["select"] == SHAPE.num_layers * tokens * (tokens / 2) * per_pair
    assert found["attention"] == floor(f"sparse_{mode}", tokens, mode)["attention"]


def test_candidates_are_looked_at_by_one_head_and_scored_by_all():
    """Of 128 tokens on the mean: one candidate, and the current block."""
    found = floor("sparse_query", 256, "query", selector="lowbit2", prefill_candidates=1.0)
    assert found["select"] == SHAPE.num_layers * 256 * 2 * (GROUPS * 128 + HEADS * 2 * 16)


def test_a_copy_runs_beside_the_products():
    found = floor("dense", 40)
    keys_and_values = 40 * SHAPE.num_layers * SHAPE.num_groups * 2 * SHAPE.head_dim * 2
    assert found["d2h"] == keys_and_values
    assert found["total"] == found["linear"] + found["attention"]
    slow = Rates(tflops=1.0, d2h_gbps=1e-9)
    config = SpardaConfig(**SETTINGS)
    assert prompt_floor(SHAPE, "dense", config, 40, slow)["total"] == keys_and_values
    assert prompt_floor(SHAPE, "transformers_cudnn", config, 40, slow)["d2h"] == 0
    stays = SpardaConfig(offload="never", **SETTINGS)
    assert prompt_floor(SHAPE, "sparse_resident", stays, 40, slow)["d2h"] == 0


def test_law_is_found_again():
    def seconds(n):
        return 3e-5 * n + 4e-10 * n * n

    law = fit_law({n: seconds(n) for n in (131072, 1024, 32768)})
    assert law["linear"] == pytest.approx(3e-5)
    assert law["quadratic"] == pytest.approx(4e-10)
    assert law["fitted_to"] == [1024, 32768, 131072]


def test_law_has_no_negative_part():
    law = fit_law({1000: 1.0, 2000: 1.5})
    assert law["quadratic"] == 0
    assert 1.5 / 2000 < law["linear"] < 1.0 / 1000
    law = fit_law({1000: 1.0, 2000: 5.0})
    assert law["linear"] == 0
    assert 1e-6 < law["quadratic"] < 1.25e-6


def test_one_length_is_no_law():
    assert fit_law({1000: 1.0}) is None
    assert fit_law({}) is None


def test_rates_are_measured(monkeypatch):
    from sparda_compile.bench import prompt_floor as module

    asked = []
    monkeypatch.setattr(module, "matmul_tflops", lambda device: asked.append(device) or 600.0)
    monkeypatch.setattr(module, "memcpy_gbps", lambda *, to_host: asked.append(to_host) or 52.123)
    assert Rates.measure("cuda") == Rates(600.0, 52.12)
    assert asked == ["cuda", True]
