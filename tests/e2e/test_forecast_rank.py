"""A model of eight KV heads, whose Forecast is of low rank, from training to a decode."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig, explain, optimize, train_forecast
from sparda_compile.errors import ConfigError
from sparda_compile.forecast.projection import Projection, to_tensors
from sparda_compile.forecast.weights import ForecastWeights
from sparda_compile.testing import random_forecast, reference_decode, tiny_llama

SMALL = {
    "block_size": 16, "pool_size": 8, "pool_stride": 4, "sink_blocks": 1, "local_blocks": 1,
    "top_k": 2,
}  # fmt: skip
CONFIG = SpardaConfig(lowering="eager", max_tokens=256, **SMALL)
ROWS, HIDDEN = 8 * 64, 64
# 16 * (512 + 64) numbers are fewer than 256 * 64, 32 * (512 + 64) are not.
RANK = 16


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_attention_heads=8, num_key_value_heads=8, head_dim=64)


@pytest.fixture(scope="module")
def fast(model):
    return optimize(model, CONFIG.replace(mode="query"))


def low_rank(rank, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * rank**-0.25 * HIDDEN**-0.25

    return ForecastWeights({n: Projection((draw(ROWS, rank), draw(rank, HIDDEN))) for n in (0, 1)})


def prompt():
    return torch.randint(0, 256, (1, 90), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rank", [None, 5])
def test_a_decode_picks_the_blocks_of_the_matrices_multiplied_out(model, fast, rank):
    weights = low_rank(rank or RANK)
    module = optimize(fast, CONFIG.replace(forecast_rank=rank), forecast=weights)
    out = module.generate(
        prompt(), max_new_tokens=25, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    products = {"bootstrap": weights[0], 0: weights[1]}
    tokens, logits = reference_decode(
        model, prompt()[0], 25, mode="forecast", forecast=products, **SMALL
    )
    assert out.sequences[0, 90:].tolist() == tokens
    torch.testing.assert_close(torch.cat(out.logits), torch.stack(logits), rtol=0, atol=1e-3)
    others = {"bootstrap": weights[1], 0: weights[0]}
    _, wrong = reference_decode(model, prompt()[0], 25, mode="forecast", forecast=others, **SMALL)
    assert not torch.allclose(torch.stack(wrong), torch.stack(logits), atol=1e-2)


def test_untrained_it_has_the_rank_of_the_rule_and_explain_counts_it(fast):
    with pytest.warns(UserWarning, match="not trained"):
        module = optimize(fast, CONFIG)
    shapes = {n: tuple(p.shape) for n, p in module.sparda_forecast.items()}
    assert shapes == {
        f"{n}{part}": shape
        for n in (0, 1)
        for part, shape in (("_u", (ROWS, RANK)), ("_v", (RANK, HIDDEN)))
    }
    assert explain(fast, CONFIG).forecast_parameters == 2 * RANK * (ROWS + HIDDEN)
    full = CONFIG.replace(forecast_rank=ROWS)
    assert explain(fast, full).forecast_parameters == 2 * ROWS * HIDDEN


def test_what_was_trained_is_saved_and_used(fast, tmp_path):
    ids = torch.randint(0, 256, (1, 150), generator=torch.Generator().manual_seed(2))
    path = tmp_path / "forecast.safetensors"
    trained = train_forecast(fast, [ids], config=CONFIG, steps=1, out=path, progress=False)
    assert trained.info.ranks == (RANK, RANK)
    found = dict(optimize(fast, CONFIG, forecast=path).sparda_forecast)
    wanted = to_tensors(trained.projections)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], factor) for name, factor in wanted.items())


def test_the_file_decides_the_rank_and_a_configuration_may_not_differ(fast, tmp_path):
    path = low_rank(8).save(tmp_path / "rank8.safetensors")
    module = optimize(fast, CONFIG, forecast=path)
    assert module.sparda_config.forecast_rank == 8
    assert module.generate(prompt(), max_new_tokens=3).shape == (1, 93)
    words = r"layer 0 have rank 8, but .* have rank 12\. Leave forecast_rank at None"
    with pytest.raises(ConfigError, match=words):
        optimize(fast, CONFIG.replace(forecast_rank=12), forecast=path)


def test_a_released_checkpoint_is_full(model, fast, tmp_path):
    projections = random_forecast(model, seed=3)
    name = "model.layers.{}.self_attn.{}_proj.weight"
    path = tmp_path / "released.pt"
    torch.save(
        {
            name.format(0, "q_curr"): projections["bootstrap"],
            name.format(0, "q_future"): projections[0],
            name.format(1, "q_future"): projections[0],
        },
        path,
    )
    module = optimize(fast, CONFIG, forecast=path)
    found = dict(module.sparda_forecast)
    assert found.keys() == {"0", "1"}
    assert torch.equal(found["0"], projections["bootstrap"])
    assert module.generate(prompt(), max_new_tokens=3).shape == (1, 93)
