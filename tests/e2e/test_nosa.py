"""Selector `nosa` from end to end, on a model whose keys carry a retention score."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.graph.effects import argument
from sparda_compile.graph.nodes import find_ops, tensor_shape
from sparda_compile.registry import HINTS
from sparda_compile.testing import random_forecast, reference_decode, tiny_nosa

pytestmark = pytest.mark.filterwarnings("ignore:Forecast weights are not trained:UserWarning")

SIZES = {"block_size": 16, "pool_size": 8, "pool_stride": 4, "sink_blocks": 1, "local_blocks": 2}
BUDGET = {"top_k": 4, "short_list": 2}
CONFIG = SpardaConfig(
    mode="dense", selector="nosa", lowering="eager", offload="always", max_tokens=256, **SIZES,
    **BUDGET,
)  # fmt: skip
LENGTHS = (120, 37)
STEPS = 14


def prompt_of(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(0, 256, (num_tokens,), generator=generator)


@pytest.fixture(scope="module")
def model():
    return tiny_nosa()


@pytest.fixture(scope="module")
def traced(model):
    return optimize(model, CONFIG)


@pytest.fixture(scope="module")
def projections(model):
    return random_forecast(model, seed=1)


def forecast_of(projections):
    return {0 if name == "bootstrap" else name + 1: w for name, w in projections.items()}


def generate(model):
    """Return new tokens and logits for both prompts, side by side with padding on the left."""
    width = max(LENGTHS)
    ids, mask = torch.zeros(2, len(LENGTHS), width, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        ids[row, width - length :] = prompt_of(length)
        mask[row, width - length :] = 1
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, width:].tolist(), torch.stack(out.logits, dim=1)


@pytest.fixture(scope="module")
def original(model):
    return generate(model)


@pytest.mark.parametrize("mode", ["query", "forecast", "exact"])
def test_full_budget_is_the_original_model(traced, original, mode):
    tokens, logits = generate(optimize(traced, CONFIG.replace(mode=mode, top_k=None)))
    assert tokens == original[0]
    torch.testing.assert_close(logits, original[1], rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def by_query(traced):
    return generate(optimize(traced, CONFIG.replace(mode="query")))


@pytest.mark.parametrize("mode", ["query", "forecast"])
def test_small_budget_is_the_reference(model, traced, by_query, original, projections, mode):
    if mode == "query":
        tokens, logits = by_query
    else:
        forecast = forecast_of(projections)
        tokens, logits = generate(optimize(traced, CONFIG.replace(mode=mode), forecast=forecast))
    for row, length in enumerate(LENGTHS):
        want, want_logits = reference_decode(
            model, prompt_of(length), STEPS, mode=mode, selector="nosa", forecast=projections,
            **SIZES, **BUDGET,
        )  # fmt: skip
        assert tokens[row] == want
        torch.testing.assert_close(logits[row], torch.stack(want_logits), rtol=0, atol=1e-3)
    assert tokens != original[0]


@pytest.mark.parametrize("hint", HINTS.names())
def test_exact_is_query_bit_for_bit(traced, by_query, hint):
    tokens, logits = generate(optimize(traced, CONFIG.replace(mode="exact", hint=hint)))
    assert tokens == by_query[0]
    assert torch.equal(logits, by_query[1])


def test_the_short_list_matters(traced, by_query):
    config = CONFIG.replace(mode="query", short_list=4)
    assert not torch.allclose(generate(optimize(traced, config))[1], by_query[1], atol=1e-3)


@pytest.mark.parametrize(
    ("mode", "selectors"),
    [
        ("query", {"nosa"}),
        ("forecast", {"nosa_forecast"}),
        ("exact", {"nosa", "nosa_forecast"}),
    ],
)
def test_scores_are_told_the_short_list(traced, mode, selectors):
    fast = optimize(traced, CONFIG.replace(mode=mode))
    graph = fast.sparda.graph("decode").graph
    scores = find_ops(graph, "score_blocks")
    assert {argument(node, "selector") for node in scores} == selectors
    sizes = ("short_list", "sink_blocks", "local_blocks")
    assert {tuple(argument(node, size) for size in sizes) for node in scores} == {(2, 1, 2)}
    weights = [n for n in graph.nodes if n.name.startswith("sparda_forecast")]
    # A Forecast is as wide as a head, before the score gets its channel.
    assert {tensor_shape(node) for node in weights} <= {(2 * 16, 64)}
