"""The loss on low-bit keys against a second writing of its formula, and against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.selectors import SELECTORS, Geometry
from sparda_compile.selectors.base import empty_summary
from sparda_compile.training.loss import first_supervised
from sparda_compile.training.mass_loss import (
    backward_mass_loss,
    block_mass,
    near_keys,
    scores_low_bit_keys,
    token_shares,
)
from sparda_compile.training.recall import block_recall, first_choice

CONFIG = SpardaConfig(
    selector="lowbit2", block_size=16, sink_blocks=1, local_blocks=1, top_k=2, lowering="eager"
)
SCALE = 0.3


def draw(batch=1, heads=4, groups=2, tokens=120, dim=8, seed=0, predicted=1):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    forecast = normal(batch, groups * predicted, tokens, dim)
    return forecast, normal(batch, heads, tokens, dim), normal(batch, groups, tokens, dim)


def softmax(values):
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    return [weight / sum(weights) for weight in weights]


def slow_loss(forecast, query, key, *, by_query=False, softcap=0.0, last=None):
    """One sequence, one query and one head at a time."""
    near, (groups, num_tokens) = near_keys(key, CONFIG)[0], key.shape[1:3]
    total = 0.0
    counted = last or num_tokens
    for g in range(groups):
        for p in range(max(first_supervised(CONFIG), num_tokens - counted), num_tokens):
            free = range(1, p // 16 - 1)
            mass = dict.fromkeys(free, 0.0)
            for head in (2 * g, 2 * g + 1):
                keys = near[g][: p // 16 * 16] if by_query else key[0, g, : p + 1]
                logits = [float(query[0, head, p] @ k) * SCALE for k in keys]
                if softcap:
                    logits = [softcap * math.tanh(x / softcap) for x in logits]
                weights = softmax(logits)
                for n in free:
                    mass[n] += sum(weights[16 * n : 16 * n + 16])
            shares = softmax(
                [float(forecast[0, g, p] @ near[g, t]) * SCALE for n in free
                 for t in range(16 * n, 16 * n + 16)]
            )  # fmt: skip
            for place, n in enumerate(free):
                target = mass[n] / sum(mass.values())
                student = sum(shares[16 * place : 16 * place + 16])
                total += target * math.log(target / student)
    return total / (groups * counted)


@pytest.mark.parametrize(
    ("options", "slow"),
    [
        ({}, {}),
        ({"teacher": "query"}, {"by_query": True}),
        ({"softcap": 0.5}, {"softcap": 0.5}),
        ({"last_tokens": 40}, {"last": 40}),
    ],
)
def test_it_is_the_formula(options, slow):
    forecast, query, key = draw()
    loss = backward_mass_loss(forecast, query, key, CONFIG, SCALE, **options)
    assert math.isclose(float(loss), slow_loss(forecast, query, key, **slow), rel_tol=1e-4)


def slow_loss_of_heads(forecast, query, key, *, by_query):
    """The same of several heads a group, each with a softmax over all full blocks."""
    near, (groups, num_tokens), total = near_keys(key, CONFIG)[0], key.shape[1:3], 0.0
    count = forecast.shape[1] // groups
    for g in range(groups):
        for p in range(first_supervised(CONFIG), num_tokens):
            free, full = range(1, p // 16 - 1), p // 16 * 16
            masses, seen = [], near[g][:full] if by_query else key[0, g, : p + 1]
            for heads, keys in (
                (query[0, 2 * g : 2 * g + 2, p], seen),
                (forecast[0, count * g : count * (g + 1), p], near[g][:full]),
            ):
                weights = [softmax([float(head @ k) * SCALE for k in keys]) for head in heads]
                mass = [sum(sum(w[16 * n : 16 * n + 16]) for w in weights) for n in free]
                masses.append([m / sum(mass) for m in mass])
            total += sum(t * math.log(t / s) for t, s in zip(*masses, strict=True))
    return total / (groups * num_tokens)


@pytest.mark.parametrize("teacher", ["attention", "query"])
@pytest.mark.parametrize("predicted", [2, 3])
def test_several_heads_are_the_formula(predicted, teacher):
    drawn = draw(predicted=predicted, tokens=80)
    loss = backward_mass_loss(*drawn, CONFIG, SCALE, teacher=teacher)
    want = slow_loss_of_heads(*drawn, by_query=teacher == "query")
    assert want > 0.0
    assert math.isclose(float(loss), want, rel_tol=1e-4)


def plain_loss(forecast, query, key):
    """The same with autograd, all queries at once."""
    position = torch.arange(first_supervised(CONFIG), key.shape[2])
    near, blocks = near_keys(key, CONFIG), key.shape[2] // 16
    free = (torch.arange(blocks) >= 1) & (torch.arange(blocks) < position[:, None] // 16 - 1)
    mass = block_mass(query[:, :, position], key, position, CONFIG, SCALE).masked_fill(~free, 0.0)
    target = mass / mass.sum(-1, keepdim=True)
    if forecast.shape[1] == key.shape[1]:
        shares = token_shares(forecast[:, :, position], near, free, SCALE).sum(-1)
    else:
        shares = block_mass(forecast[:, :, position], near, position, CONFIG, SCALE, full_only=True)
        shares = shares.masked_fill(~free, 0.0)
        shares = shares / shares.sum(-1, keepdim=True)
    terms = target * (target / shares.where(free, 1.0)).where(free, 1.0).log()
    return terms.sum() / (key.shape[0] * key.shape[1] * key.shape[2])


@pytest.mark.parametrize("predicted", [1, 2, 3])
def test_its_gradient_is_that_of_autograd_and_weight_scales_it(monkeypatch, predicted):
    forecast, query, key = draw(batch=2, predicted=predicted)
    forecast.requires_grad_()
    want = plain_loss(forecast, query, key)
    want.backward()
    gradient, forecast.grad = forecast.grad, None
    monkeypatch.setattr("sparda_compile.training.mass_loss._TILE_SCORES", 7 * 2 * 4 * 120)
    got = backward_mass_loss(forecast, query, key, CONFIG, SCALE, weight=0.5)
    torch.testing.assert_close(got, want.detach())
    torch.testing.assert_close(forecast.grad, gradient / 2, rtol=1e-4, atol=1e-9)
    assert gradient.any()
    assert not forecast.grad[:, :, : first_supervised(CONFIG)].any()


def test_its_gradient_is_that_of_finite_differences():
    forecast, query, key = draw(predicted=2, tokens=90)
    forecast.requires_grad_()
    backward_mass_loss(forecast, query, key, CONFIG, SCALE)
    direction = torch.randn(forecast.shape, generator=torch.Generator().manual_seed(1))
    step = 1e-2 * direction
    up, down = (
        backward_mass_loss(forecast.detach() + each, query, key, CONFIG, SCALE)
        for each in (step, -step)
    )
    slope = float((forecast.grad * direction).sum())
    assert abs(slope) > 1e-3
    assert math.isclose(float(up - down) / 2e-2, slope, rel_tol=2e-3)


def test_two_heads_that_are_one_are_that_one():
    forecast, query, key = draw()
    found = []
    for heads in (1, 2):
        leaf = forecast.clone().requires_grad_()
        given = leaf.repeat_interleave(heads, dim=1)
        found += [(backward_mass_loss(given, query, key, CONFIG, SCALE), leaf.grad)]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("heads", [2, 4])
def test_a_forecast_that_is_the_query_learns_nothing_from_it(heads):
    _, query, key = draw(heads=heads)
    leaf = query.clone().requires_grad_()
    loss = backward_mass_loss(leaf, query, key, CONFIG, SCALE, teacher="query")
    assert abs(float(loss)) < 1e-6
    assert leaf.grad.abs().max() < 1e-8


def test_blocks_that_heads_all_but_leave_out_have_finite_gradients():
    forecast, query, key = draw(predicted=2)
    # The sink takes all of the softmax.
    key[:, :, :16] = forecast[:, :2].mean(2, keepdim=True) * 400
    leaf = forecast.clone().requires_grad_()
    loss = backward_mass_loss(leaf, query, key, CONFIG, 30.0)
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("predicted", [1, 2])
@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4"])
def test_recall_is_what_the_deployed_selectors_share(selector, predicted):
    config = CONFIG.replace(selector=selector, forecast_heads=predicted)
    forecast, query, key = draw(tokens=160, predicted=predicted)
    hits = total = 0
    rule = SELECTORS[selector]
    geometry = Geometry(10, 16, 8, 4)
    for p in range(first_choice(config), 160):
        lengths = torch.tensor([p], dtype=torch.int32)
        tensors = empty_summary(rule.summary, key, geometry)
        every = torch.ones(1, p, dtype=torch.bool)
        rule.summary.extend(tensors, key[:, :, :p], torch.zeros(1).int(), every, geometry)
        picked = []
        for each, heads in ((rule, query), (SELECTORS[config.forecast_selector], forecast)):
            scored = each.score(heads[:, :, p : p + 1], tensors, lengths, SCALE, geometry)
            picked.append(scored[0, :, 1 : p // 16 - 1].topk(2).indices)
        for true, guess in zip(*picked, strict=True):
            hits, total = hits + len({*true.tolist()} & {*guess.tolist()}), total + 2
    recall = block_recall(forecast, query, key, config, SCALE, 1000)
    assert 0.0 < hits / total < 1.0
    torch.testing.assert_close(float(recall), hits / total)


@pytest.mark.parametrize(
    ("selector", "is_low_bit"),
    [("infllm2", False), ("quest", False), ("lowbit2", True), ("lowbit4", True)],
)
def test_which_selectors_score_low_bit_keys(selector, is_low_bit):
    assert scores_low_bit_keys(CONFIG.replace(selector=selector)) == is_low_bit


@pytest.mark.gpu
@pytest.mark.parametrize("teacher", ["attention", "query"])
def test_half_precision_on_a_gpu_is_near_that_on_a_cpu(teacher):
    # To float32 the gradient is off by 23%, on a CPU too: low-bit keys are of the keys' dtype.
    drawn = [each.bfloat16() for each in draw(batch=2, heads=9, groups=3, tokens=1000, dim=64)]
    found = []
    for device in ("cuda", "cpu"):
        forecast, query, key = (each.detach().to(device) for each in drawn)
        forecast.requires_grad_()
        config = CONFIG.replace(block_size=64)
        loss = backward_mass_loss(forecast, query, key, config, 0.125, teacher=teacher)
        found.append((float(loss), forecast.grad.float().cpu()))
    (loss, gradient), (want, expected) = found
    assert math.isclose(loss, want, rel_tol=0.02)
    assert float((gradient - expected).norm() / expected.norm()) < 0.05
