from __future__ import annotations

import math

import pytest
import torch

from sparda_compile import train_forecast
from sparda_compile.errors import ConfigError
from sparda_compile.training.checkpoint import checkpoint_path
from sparda_compile.training.trainer import ForecastTrainer

pytestmark = pytest.mark.usefixtures("shared_capture")


def train(gym, batches, steps, **options):
    options = {"config": gym.config, "lr": 3e-3, "progress": False} | options
    return train_forecast(gym.model, batches, steps=steps, **options)


def test_held_out_texts_are_measured_before_between_and_behind_and_change_nothing(gym, tmp_path):
    held_out, batches = gym.batches(2, seed=9), gym.batches(4)
    found = []
    options = {"held_out": held_out, "measure_every": 2, "on_measure": found.append}
    measured = train(gym, batches, 5, **options)
    assert [each.step for each in found] == [0, 2, 4, 5]
    assert all(each.num_tokens == 400 and 0 < each.recall < 1 for each in found)
    plain = train(gym, batches, 5)
    assert all(torch.equal(measured[layer], plain[layer]) for layer in plain)
    trainer = ForecastTrainer(gym.model, gym.config, 3e-3)
    steps = [trainer.step([ids]) for ids in held_out[:1]]
    again = ForecastTrainer(gym.model, gym.config, 3e-3).measure(held_out[:1])
    assert math.isclose(again.loss, steps[0].loss, rel_tol=1e-6)
    assert again.recalls == pytest.approx(steps[0].recalls)
    with pytest.raises(ConfigError, match="no batch to measure"):
        trainer.measure([])


def test_a_resumed_run_measures_where_it_begins(gym, tmp_path):
    out, found = tmp_path / "forecast.safetensors", []
    train(gym, gym.batches(2), 3, out=out)
    options = {"held_out": gym.batches(1, seed=9), "measure_every": 10, "on_measure": found.append}
    train(gym, gym.batches(2), 4, resume=checkpoint_path(out), **options)
    assert [each.step for each in found] == [3, 4]


@pytest.mark.parametrize("teacher", ["attention", "query"])
def test_a_forecast_for_low_bit_keys_is_trained_and_knows_it(gym, teacher):
    config = gym.config.replace(selector="lowbit2")
    found = []
    options = {"config": config, "teacher": teacher, "held_out": gym.batches(1, length=320, seed=9)}
    batches = gym.batches(6, length=320)
    weights = train(gym, batches, 25, **options, on_measure=found.append, lr=1e-2)
    assert weights.info.selector == "lowbit2"
    assert found[-1].loss < 0.98 * found[0].loss


def test_a_checkpoint_of_another_selector_is_refused(gym, tmp_path):
    out = tmp_path / "forecast.safetensors"
    train(gym, gym.batches(1), 1, out=out)
    config = gym.config.replace(selector="lowbit4")
    with pytest.raises(ConfigError, match="trained with selector=infllm2"):
        train(gym, gym.batches(1), 2, config=config, resume=checkpoint_path(out))
