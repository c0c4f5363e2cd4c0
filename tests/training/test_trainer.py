from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import sparda_compile
from sparda_compile import optimize, train_forecast
from sparda_compile.errors import ConfigError, UnsupportedInputError
from sparda_compile.forecast.projection import Projection, to_tensors
from sparda_compile.forecast.weights import load_forecast
from sparda_compile.training import rank_start
from sparda_compile.training import trainer as trainer_module
from sparda_compile.training.checkpoint import checkpoint_path
from sparda_compile.training.trainer import ForecastTrainer

pytestmark = pytest.mark.usefixtures("shared_capture")


def train(gym, batches, steps, **options):
    options = {"config": gym.config, "lr": 3e-3, "progress": False} | options
    return train_forecast(gym.model, batches, steps=steps, **options)


def random_start(graph, sites, shapes, captured, dtype):
    generator = torch.Generator().manual_seed(0)
    return {
        layer: Projection(
            (torch.empty(*shape.factors[0]).uniform_(-1 / 8, 1 / 8, generator=generator),)
        )
        for layer, shape in shapes.items()
    }


def test_it_goes_on_from_the_mean_query_of_each_group(gym):
    held_out = gym.batches(2, length=320, seed=9)
    trainer = ForecastTrainer(gym.model, gym.config, 1e-9)
    for number, layer in enumerate(gym.model.model.layers):
        heads = layer.self_attn.q_proj.weight.detach().view(2, 2, 16, 64)
        weight = trainer.weights[number].product().detach()
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, heads.mean(1).flatten(0, 1), rtol=0, atol=1e-7)
    start = trainer.step(held_out)
    weights = train(gym, gym.batches(12, length=320), 40)
    with torch.no_grad():
        for name, weight in trainer.parameters.items():
            weight.copy_(to_tensors(weights.projections)[name])
    assert trainer.step(held_out).loss < 0.95 * start.loss


def test_from_random_weights_loss_falls_and_recall_rises_and_a_decode_takes_the_weights(
    gym, monkeypatch
):
    """Layer 0 forecasts from what its own query is made of, so much can be predicted."""
    monkeypatch.setattr(rank_start, "initial_forecast", random_start)
    held_out = gym.batches(2, length=320, seed=9)
    reports = []
    weights = train(gym, gym.batches(12, length=320), 150, lr=1e-2, on_step=reports.append)
    assert [r.step for r in reports] == list(range(1, 151))
    assert all(r.num_tokens == 320 and r.seconds > 0 for r in reports)
    trainer = ForecastTrainer(gym.model, gym.config, 1e-9)
    fresh = trainer.step(held_out)
    with torch.no_grad():
        for name, weight in trainer.parameters.items():
            weight.copy_(to_tensors(weights.projections)[name])
    trained = trainer.step(held_out)
    assert trained.losses[0] < 0.85 * fresh.losses[0]
    assert trained.loss < 0.9 * fresh.loss
    assert trained.recalls[0] > fresh.recalls[0] + 0.15
    assert trained.recall > fresh.recall + 0.1
    config = gym.config.replace(mode="forecast", max_tokens=512)
    fast = optimize(gym.model, config, forecast=weights)
    assert fast.generate(held_out[0], max_new_tokens=2).shape == (1, 322)


def test_several_heads_learn_from_where_they_start_and_know_more_than_one(gym):
    held_out, found = gym.batches(2, length=200, seed=9), {}
    for heads in (1, 2):
        config = gym.config.replace(selector="lowbit2", forecast_heads=heads)
        trainer = ForecastTrainer(gym.model, config, 3e-3)
        start = trainer.measure(held_out)
        for batch in gym.batches(24, length=200):
            trainer.step([batch])
        found[heads] = start, trainer.measure(held_out)
        info = trainer.info()
        assert (info.heads, info.groups, info.head_dim) == (heads, (2, 2), (16, 16))
        assert trainer.weights[0].shape.rows == heads * 32
    start, end = found[2]
    assert end.losses[1] < 0.9 * start.losses[1]
    # Layer 0 starts as its own query: nothing that one head learns comes near to it.
    assert start.recalls[0] == 1.0
    assert end.losses[0] < 0.5 * found[1][1].losses[0]


@pytest.mark.parametrize("selector", ["infllm2", "quest"])
def test_several_heads_are_not_trained_for_pooled_keys(gym, selector):
    config = gym.config.replace(selector=selector, forecast_heads=2)
    words = f"forecast_heads=2 cannot be trained for selector='{selector}'.*use selector='lowbit2'"
    with pytest.raises(ConfigError, match=words):
        ForecastTrainer(gym.model, config, 1e-3)


def test_a_checkpoint_of_other_heads_is_refused(gym):
    two = gym.config.replace(selector="lowbit2", forecast_heads=2)
    made = ForecastTrainer(gym.model, two, 1e-3).checkpoint(0)
    one = ForecastTrainer(gym.model, two.replace(forecast_heads=1), 1e-3)
    with pytest.raises(ConfigError, match="trained with heads=2, this run has heads=1"):
        one.restore(made)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("teacher", "heads"), [("attention", 1), ("query", 1), ("attention", 2)])
def test_the_fused_loss_on_low_bit_keys_takes_the_same_step(gym, teacher, heads):
    pytest.importorskip("triton")
    config = gym.config.replace(selector="lowbit2", forecast_heads=heads)
    (batch,) = gym.batches(1, length=150)
    reports, weights = [], []
    for backend in ("plain", "triton"):
        trainer = ForecastTrainer(gym.model, config, 1e-3, teacher=teacher, backend=backend)
        reports.append(trainer.step([batch]))
        weights.append(trainer.weights[0].product().detach())
    plain, fused = reports
    assert fused.losses == pytest.approx(plain.losses, rel=1e-4)
    assert fused.gradient_norm == pytest.approx(plain.gradient_norm, rel=1e-3)
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-4)


def test_the_model_is_left_as_it_is(gym):
    before = {name: value.clone() for name, value in gym.model.state_dict().items()}
    train(gym, gym.batches(1), 2)
    after = gym.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.requires_grad and p.grad is None for p in gym.model.parameters())


@pytest.mark.parametrize("rank", [None, 8])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(gym, tmp_path, rank):
    options = {"accumulate": 2, "config": gym.config.replace(forecast_rank=rank)}
    batches = gym.batches(5)
    whole = train(gym, batches, 7, out=tmp_path / "whole" / "forecast.safetensors", **options)
    out = tmp_path / "forecast.safetensors"
    train(gym, batches, 3, out=out, **options)
    first = load_forecast(out)
    resumed = train(gym, batches, 7, out=out, resume=checkpoint_path(out), **options)
    assert (first.info.steps, resumed.info.steps) == (3, 7)
    assert resumed.info.ranks == (rank, rank)
    on_disk = load_forecast(out)
    assert on_disk.info == resumed.info
    factors = [to_tensors(w.projections) for w in (whole, resumed, first, on_disk)]
    assert list(factors[0]) == (["0", "1"] if rank is None else ["0_u", "0_v", "1_u", "1_v"])
    for name, weight in factors[0].items():
        assert torch.equal(weight, factors[1][name])
        assert not torch.equal(weight, factors[2][name])
        assert torch.equal(weight, factors[3][name])


def test_both_matrices_of_low_rank_get_the_gradient_of_their_product(gym):
    """The gradient of a full W is checked against the formula of the loss in test_loss.py."""
    (ids,) = gym.batches(1, length=120)
    low = ForecastTrainer(gym.model, gym.config.replace(forecast_rank=8), 1e-3)
    full = ForecastTrainer(gym.model, gym.config, 1e-3)
    losses = []
    with torch.no_grad():
        for layer, weight in low.weights.items():
            full.parameters[str(layer)].copy_(weight.product())
    for trainer in (low, full):
        losses.append(dict.fromkeys(trainer.weights, torch.zeros(())))
        trainer._accumulate(ids, 1.0, losses[-1], None)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for layer, weight in low.weights.items():
        u, v = weight.factors
        gradient = full.parameters[str(layer)].grad
        assert u.dtype == v.dtype == u.grad.dtype == torch.float32
        for got, want in ((u.grad, gradient @ v.detach().T), (v.grad, u.detach().T @ gradient)):
            assert want.any()
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_resumption_goes_on_with_the_next_batch_whatever_a_step_takes(gym, tmp_path, monkeypatch):
    seen = []
    step = ForecastTrainer.step

    def noted(trainer, batches, *rest):
        seen.append([int(ids[0, 0]) for ids in batches])
        return step(trainer, batches, *rest)

    monkeypatch.setattr(ForecastTrainer, "step", noted)
    batches = [torch.cat([torch.tensor([[n]]), gym.batches(1)[0]], dim=1) for n in range(6)]
    out = tmp_path / "forecast.safetensors"
    train(gym, batches, 1, accumulate=3, out=out)
    train(gym, batches, 3, accumulate=2, resume=checkpoint_path(out))
    assert seen == [[0, 1, 2], [3, 4], [5, 0]]


def test_accumulated_batches_are_one_large_batch(gym):
    parts = gym.batches(2)
    trainers = [ForecastTrainer(gym.model, gym.config, 1e-3) for _ in range(2)]
    reports = [trainers[0].step(parts), trainers[1].step([torch.cat(parts)])]
    assert math.isclose(reports[0].loss, reports[1].loss, rel_tol=1e-5)
    for name, weight in trainers[0].parameters.items():
        torch.testing.assert_close(weight.grad, trainers[1].parameters[name].grad)


def test_gradient_is_clipped_and_the_optimizer_is_that_of_the_paper(gym, monkeypatch):
    assert trainer_module._LARGEST_NORM == 0.5
    monkeypatch.setattr(trainer_module, "_LARGEST_NORM", 0.01)
    trainer = ForecastTrainer(gym.model, gym.config, 1e-3)
    (group,) = trainer.optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-6, 0.01)
    report = trainer.step(gym.batches(1))
    gradients = torch.cat([w.grad.flatten() for w in trainer.parameters.values()])
    assert report.gradient_norm > 0.02
    assert math.isclose(float(gradients.norm()), 0.01, rel_tol=1e-3)


def test_master_weights_are_float32_and_the_model_sees_its_own_dtype(gym):
    model = sparda_compile.testing.build("plain").to(torch.bfloat16)
    trainer = ForecastTrainer(model, gym.config, 1e-3)
    heard = []
    trainer.run(gym.batches(1)[0], lambda site, forecast, *_: heard.append(forecast.dtype))
    assert set(heard) == {torch.bfloat16}
    report = trainer.step(gym.batches(1))
    assert math.isfinite(report.loss)
    for weight in trainer.parameters.values():
        assert weight.dtype == weight.grad.dtype == torch.float32
        assert trainer.optimizer.state[weight]["exp_avg"].dtype == torch.float32


def test_what_is_before_the_last_tokens_does_not_teach(gym):
    ids = gym.batches(1)[0]
    trainers = [ForecastTrainer(gym.model, gym.config, 1e-3, last_tokens=n) for n in (None, 30)]
    losses = [trainer.step([ids]).losses for trainer in trainers]
    assert all(losses[0][layer] != losses[1][layer] for layer in losses[0])


def test_teacher_query_brings_the_choice_nearer_to_that_of_the_query(gym):
    batches = gym.batches(4, batch_size=2, length=300)
    recalls = {}
    for teacher in ("attention", "query"):
        trainer = ForecastTrainer(gym.model, gym.config, 1e-2, teacher=teacher)
        reports = [trainer.step([batches[n % 4]]) for n in range(16)]
        recalls[teacher] = sum(report.recall for report in reports[-4:]) / 4
        assert reports[-1].loss < reports[3].loss
        start = reports[0].recall
    assert recalls["attention"] < start < recalls["query"]


def test_recall_of_a_sequence_without_a_choice_is_nan(gym):
    report = ForecastTrainer(gym.model, gym.config, 1e-3).step(gym.batches(1, length=60))
    assert math.isnan(report.recall)
    assert report.loss > 0.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0 is too small"),
        ({"accumulate": 0}, "accumulate=0 is too small"),
        ({"last_tokens": 0}, "last_tokens=0 is too small"),
        ({"lr": 0.0}, "lr=0.0 is not allowed"),
        ({"teacher": "dense"}, "teacher='dense' is not known; use one of attention, query"),
        ({"resume": "nowhere.checkpoint"}, "nowhere.checkpoint.*no file"),
    ],
)
def test_numbers_that_are_not_allowed(gym, options, words):
    with pytest.raises(ConfigError, match=words):
        train(gym, gym.batches(1), **({"steps": 1} | options))


@pytest.mark.parametrize("top_k", [0, None])
def test_top_k_must_leave_a_choice(gym, top_k):
    with pytest.raises(ConfigError, match=f"top_k={top_k} leaves a Forecast nothing to choose"):
        train(gym, gym.batches(1), 1, config=gym.config.replace(top_k=top_k))


def test_checkpoint_of_other_sizes_or_too_far_is_refused(gym, tmp_path):
    out = tmp_path / "forecast.safetensors"
    train(gym, gym.batches(1), 1, out=out)
    resume = checkpoint_path(out)
    with pytest.raises(ConfigError, match=r"top_k=3, this run has top_k=4.*same model"):
        train(gym, gym.batches(1), 2, resume=resume, config=gym.config.replace(top_k=4))
    low = gym.config.replace(forecast_rank=8)
    with pytest.raises(ConfigError, match=r"ranks=\(None, None\), this run has ranks=\(8, 8\)"):
        train(gym, gym.batches(1), 2, resume=resume, config=low)
    with pytest.raises(ConfigError, match=r"has done 1 steps.*raise steps"):
        train(gym, gym.batches(1), 1, resume=resume)


def test_loss_that_is_not_finite_stops(gym, monkeypatch):
    trainer = ForecastTrainer(gym.model, gym.config, 1e-3)
    before = trainer.parameters["1"].detach().clone()
    with torch.no_grad():
        trainer.parameters["1"][0, 0] = math.nan
    with pytest.raises(UnsupportedInputError, match=r"not finite at step 1 \(layers \[1\]\)"):
        trainer.step(gym.batches(1))
    assert torch.equal(trainer.parameters["1"].detach()[1:], before[1:])
    assert trainer.steps_done == 0


def test_batches_that_do_not_fit_are_refused(gym):
    trainer = ForecastTrainer(gym.model, gym.config, 1e-3)
    with pytest.raises(UnsupportedInputError, match=r"40 tokens per sequence.*pass 49 or more"):
        trainer.step(gym.batches(1, length=40))
    with pytest.raises(UnsupportedInputError, match=r"ids from 0 to 256.*0 to 255"):
        trainer.step([torch.arange(257)[None]])


def test_it_is_a_function_of_the_package():
    assert sparda_compile.train_forecast is train_forecast
    assert isinstance(sparda_compile.testing.build("plain"), nn.Module)
