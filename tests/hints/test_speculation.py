"""The predictor's state in a cache: through a prompt, steps, turns, beams, growth and reset."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.hints.speculation import EmaPredictor
from sparda_compile.kernels.predict_blocks import predict_blocks_reference

CONFIG = {
    "mode": "speculate", "offload": "never", "machine": "h200", "speculate_where": "always",
    "speculation_budget": 1.0,
}  # fmt: skip
FORCED = 3


def state_of(cache, name, layer=1):
    return cache.kv.state[f"sparda_{name}_{layer}"]


def expected(cache, layer=1):
    """Return what level and trend say of the step that comes next."""
    config = cache.kv.layout.config
    choice = (FORCED + 2, config.block_size, config.sink_blocks, config.local_blocks)
    level, trend = state_of(cache, "level", layer), state_of(cache, "trend", layer)
    return predict_blocks_reference(level, trend, cache.kv.state["sparda_lengths"], choice, 0.0)


def test_state_of_a_layer(lab):
    layout = lab.module(**CONFIG).programs.latest_plan("decode").layout
    specs = EmaPredictor().state(layout, layout.layers[0])
    assert set(specs) == {"level", "trend", "predicted", "budget"}
    predicted, budget = specs["predicted"], specs["budget"]
    assert predicted.shape == (1, layout.layers[0].num_groups, FORCED + 2)
    assert (predicted.dtype, predicted.fill, predicted.is_shared) == (torch.int32, -1, False)
    assert (budget.shape, budget.fill, budget.is_shared) == ((1,), FORCED + 2, True)
    assert set(specs) <= set(layout.tensors(layout.layers[0]))


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_every_call_leaves_the_prediction_for_the_next(lab, prefill):
    module = lab.module(prefill=prefill, **CONFIG)
    cache = module.new_cache(256)
    mask = torch.ones(2, 80, dtype=torch.int64)
    mask[0, :50] = 0  # so that the sequences go on at other positions
    module(torch.randint(0, 256, (2, 80)), past_key_values=cache, attention_mask=mask)
    for new in (1, 1, 8, 1, 1):
        for layer in range(lab.num_layers):
            predicted = state_of(cache, "predicted", layer)
            assert torch.equal(predicted, expected(cache, layer))
        short = predicted[0, 0].tolist()
        assert set(range(cache.kv.lengths()[0] // 16 + 1)) == {*short} - {-1}
        mask = torch.cat([mask, torch.ones(2, new, dtype=torch.int64)], 1)
        module(torch.randint(0, 256, (2, new)), past_key_values=cache, attention_mask=mask)


def test_beams_growth_and_reset(lab):
    module = lab.module(**CONFIG)
    cache = module.new_cache(256)
    module(torch.randint(0, 256, (2, 200)), past_key_values=cache)
    cache.kv.set_budgets({1: 4})
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(state_of(cache, "predicted")[0], state_of(cache, "predicted")[1])
    assert state_of(cache, "budget").tolist() == [4]
    layout = cache.kv.layout
    larger = cache.kv.grow(type(layout)(layout.config, layout.layers, 2, 512))
    assert torch.equal(larger.state["sparda_predicted_1"], state_of(cache, "predicted"))
    assert larger.state["sparda_budget_1"].tolist() == [4]
    cache.reset()
    assert (state_of(cache, "predicted") == -1).all()
    assert state_of(cache, "budget").tolist() == [FORCED + 2]
