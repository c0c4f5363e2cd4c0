"""The loss against a second writing of its formula: one query, one group, one key at a time."""

from __future__ import annotations

import math

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.selectors import Geometry
from sparda_compile.selectors.pooled_keys import PooledKeys, windows_to_blocks
from sparda_compile.training import loss as subject
from sparda_compile.training.loss import (
    backward_loss,
    best_blocks,
    first_supervised,
    free_blocks,
    geometry_of,
    pool_keys,
    tile_loss,
)
from sparda_compile.training.teacher import aligned_teacher, fine_keys

CONFIG = SpardaConfig(
    block_size=16, pool_size=8, pool_stride=4, sink_blocks=1, local_blocks=1, top_k=2
)


def draw(batch=1, heads=4, groups=2, tokens=101, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    forecast = normal(batch, groups, tokens, dim)
    return forecast, normal(batch, heads, tokens, dim), normal(batch, groups, tokens, dim)


def slow_teacher(query_RTD, key_TD, p, config, scale, softcap):
    """Return the mass of each deployed window for one query, as a list."""
    size, stride = config.pool_size, config.pool_stride
    num_tokens = len(key_TD)
    fine = [(key_TD[j] + key_TD[j + 1]) / 2 for j in range(num_tokens - 1) if j <= p]
    mass = [0.0] * len(fine)
    for q_TD in query_RTD:
        logits = [float(q_TD[p] @ key) * scale for key in fine]
        if softcap:
            logits = [softcap * math.tanh(x / softcap) for x in logits]
        top = max(logits)
        total = sum(math.exp(x - top) for x in logits)
        mass = [m + math.exp(x - top) / total for m, x in zip(mass, logits, strict=True)]
    cells = []
    for c in range((num_tokens - size) // stride + 1):
        span = range(max(stride * c - 1, 0), stride * c + stride)
        cells.append(max((mass[j] for j in span if j < len(mass)), default=0.0))
    return cells


def slow_query_teacher(query_RTD, key_TD, p, config, scale):
    """Return the weight of each pooled key for one query, as a list."""
    size, stride = config.pool_size, config.pool_stride
    starts = range(0, len(key_TD) - size + 1, stride)
    complete = [key_TD[s : s + size].mean(0) for s in starts if s + size <= p]
    cells = [0.0] * len(starts)
    for q_TD in query_RTD:
        weights = [math.exp(float(q_TD[p] @ key) * scale) for key in complete]
        for c, weight in enumerate(weights):
            cells[c] += weight / sum(weights)
    return cells


def slow_blocks(cells, p, config):
    """Return the free blocks that the teacher selects."""
    ratio = config.block_size // config.pool_stride
    overhang = config.pool_size // config.pool_stride - 1
    current = p // config.block_size
    free = range(config.sink_blocks, max(current - config.local_blocks, config.sink_blocks))
    best = {
        m: max(cells[max(m * ratio - overhang, 0) : (m + 1) * ratio], default=-1.0) for m in free
    }
    return sorted(best, key=lambda m: -best[m])[: config.top_k]


def slow_loss(forecast, query, key, config, scale, softcap=0.0, teacher="attention"):
    """Return the loss in float64 with autograd's graph from the forecast."""
    batch, groups, num_tokens, dim = forecast.shape
    repeat = query.shape[1] // groups
    size, stride = config.pool_size, config.pool_stride
    ratio = config.block_size // stride
    losses = []
    for b in range(batch):
        for g in range(groups):
            pooled = torch.stack(
                [
                    key[b, g, start : start + size].mean(0)
                    for start in range(0, num_tokens - size + 1, stride)
                ]
            ).double()
            for p in range(num_tokens):
                heads = query[b, g * repeat : (g + 1) * repeat].double(), key[b, g].double()
                if teacher == "query":
                    cells = slow_query_teacher(*heads, p, config, scale)
                else:
                    cells = slow_teacher(*heads, p, config, scale, softcap)
                target = [cell / (sum(cells) + 1e-8) for cell in cells]
                seen = [c for c in range(len(cells)) if stride * c <= p]
                logits = (pooled[seen] @ forecast[b, g, p].double()) / math.sqrt(dim)
                student = logits.softmax(0)
                chosen = [
                    m * ratio + i
                    for m in slow_blocks(target, p, config)
                    for i in range(ratio)
                    if m * ratio + i < len(cells)
                ]
                t = [target[c] for c in chosen]
                s = [student[c] for c in chosen]
                t = torch.tensor([*t, max(sum(target) - sum(t), 0.0)], dtype=torch.float64)
                s = torch.stack([*s, (1.0 - sum(s)) * torch.ones((), dtype=torch.float64)])
                t, s = t.clamp(min=1e-8), s.clamp(min=1e-8)
                t, s = t / t.sum(), s / s.sum()
                losses.append((t * (t.log() - s.log())).sum())
    return torch.stack(losses).sum() / (batch * groups * num_tokens)


@pytest.mark.parametrize("teacher", ["attention", "query"])
@pytest.mark.parametrize(
    ("changes", "sizes", "softcap"),
    [
        ({}, {}, 0.0),
        ({"pool_size": 16, "top_k": 1}, {"batch": 2, "heads": 3, "groups": 1, "tokens": 83}, 0.0),
        ({"sink_blocks": 2, "local_blocks": 0}, {"tokens": 70, "dim": 6}, 3.0),
        ({"pool_size": 4, "top_k": 9}, {"heads": 2, "groups": 2, "tokens": 96}, 0.0),
    ],
)
def test_loss_and_gradient_are_those_of_the_formula(changes, sizes, softcap, teacher, monkeypatch):
    config = CONFIG.replace(**changes)
    forecast, query, key = draw(**sizes)
    query, scale = 2.0 * query, 0.4
    slow = forecast.clone().requires_grad_()
    want = slow_loss(slow, query, key, config, scale, softcap, teacher)
    want.backward()
    # Small tiles, so that the seams between them are tested.
    monkeypatch.setattr(subject, "_TILE_ELEMENTS", 2 * 7 * 24)
    leaf = forecast.clone().requires_grad_()
    got = backward_loss(leaf, query, key, config, scale, softcap=softcap, teacher=teacher)
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), want.detach(), rtol=2e-6, atol=0.0)
    torch.testing.assert_close(leaf.grad, slow.grad, rtol=2e-4, atol=2e-9)
    assert slow.grad.abs().max() > 1e-5


def test_tiles_do_not_change_the_loss(monkeypatch):
    tensors = draw(batch=2, tokens=150)
    results = []
    for elements in (1 << 24, 2 * 2 * 40, 1):
        monkeypatch.setattr(subject, "_TILE_ELEMENTS", elements)
        leaf = tensors[0].clone().requires_grad_()
        results.append((backward_loss(leaf, *tensors[1:], CONFIG, 0.3), leaf.grad))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0.0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-9)


def test_no_tile_sees_all_pairs(monkeypatch):
    """Memory is linear in the length: a longer sequence has more tiles, not larger ones."""
    monkeypatch.setattr(subject, "_TILE_ELEMENTS", 4096)
    sizes = []
    tile = subject.tile_loss

    def measured(forecast, pooled, cells, *rest):
        sizes.append(cells.numel())
        return tile(forecast, pooled, cells, *rest)

    monkeypatch.setattr(subject, "tile_loss", measured)
    for tokens in (256, 1024):
        sizes.clear()
        backward_loss(*draw(tokens=tokens), CONFIG, 0.3)
        assert max(sizes) <= 4096
    assert len(sizes) > 8


def test_weight_scales_the_gradient_and_not_the_loss():
    tensors = draw()
    leaves = [tensors[0].clone().requires_grad_() for _ in range(2)]
    losses = [
        backward_loss(leaf, *tensors[1:], CONFIG, 0.3, weight=weight)
        for leaf, weight in zip(leaves, (1.0, 0.25), strict=True)
    ]
    assert losses[0] == losses[1]
    torch.testing.assert_close(leaves[1].grad, 0.25 * leaves[0].grad)


@pytest.mark.parametrize("last_tokens", [20, 1000])
def test_only_the_last_tokens_teach(last_tokens):
    forecast, query, key = draw(tokens=150)
    leaves = [forecast.clone().requires_grad_() for _ in range(2)]
    every = backward_loss(leaves[0], query, key, CONFIG, 0.3)
    few = backward_loss(leaves[1], query, key, CONFIG, 0.3, last_tokens=last_tokens)
    if last_tokens > 150:
        assert few == every
        return
    first = 150 - last_tokens
    assert not leaves[1].grad[:, :, :first].any()
    torch.testing.assert_close(
        leaves[1].grad[:, :, first:], leaves[0].grad[:, :, first:] * 150 / last_tokens
    )


def test_gradient_reaches_the_forecast_alone():
    forecast, query, key = (t.requires_grad_() for t in draw())
    backward_loss(forecast, query, key, CONFIG, 0.3)
    assert forecast.grad is not None
    assert query.grad is None
    assert key.grad is None


def test_queries_without_a_choice_add_nothing():
    forecast, query, key = draw(tokens=first_supervised(CONFIG) + 1)
    leaf = forecast.requires_grad_()
    assert backward_loss(leaf, query, key, CONFIG, 0.3) > 0.0
    assert not leaf.grad[:, :, :-1].any()
    assert leaf.grad[:, :, -1].any()


def test_student_that_knows_the_teacher_has_the_smallest_loss():
    """A forecast whose dot products are the teacher's logarithms cannot be moved to be better."""
    _, query, key = draw(heads=1, groups=1, tokens=96, dim=32)
    queries = range(90, 96)
    cells = aligned_teacher(query, fine_keys(key), queries, (8, 4), 0.5)
    pooled = pool_keys(key, CONFIG)[:, :, : cells.shape[-1]]
    target = cells / cells.sum(-1, keepdim=True)
    wanted = target[0, 0].clamp(min=1e-6).log() * math.sqrt(32)
    forecast = torch.linalg.lstsq(pooled[0, 0].double(), wanted.T.double()).solution.T.float()
    best = tile_loss(forecast[None, None], pooled, cells, queries, CONFIG)
    other = tile_loss(forecast.flip(0)[None, None], pooled, cells, queries, CONFIG)
    assert 0.0 <= best < 1e-3 < other


def test_pooled_keys_are_the_deployed_ones():
    key = draw(tokens=101)[2].to(torch.bfloat16)
    summary, geometry = PooledKeys(), Geometry(7, 16, 8, 4)
    tensors = [
        torch.zeros(1, 2, *shape, dtype=key.dtype)
        for shape in summary.shapes(geometry, key.shape[-1]).values()
    ]
    everything = torch.ones(1, 101, dtype=torch.bool)
    summary.extend(tensors, key, torch.zeros(1, dtype=torch.int32), everything, geometry)
    mine = pool_keys(key, CONFIG)
    assert torch.equal(mine, tensors[0][:, :, : mine.shape[2]])


def test_free_blocks_are_those_that_a_decode_step_does_not_read_anyway():
    positions = torch.tensor([0, 47, 48, 100])
    free = free_blocks(positions, CONFIG, 8)
    assert [row.nonzero().flatten().tolist() for row in free] == [[], [], [1], [1, 2, 3, 4]]
    assert geometry_of(CONFIG, 101) == Geometry(7, 16, 8, 4)


def test_ties_go_to_the_lower_block():
    scores = torch.tensor([[[[5.0, -1.0, 2.0, -1.0, 2.0, float("-inf"), 2.0]]]])
    free = torch.tensor([[False, True, True, True, True, True, True]])
    for count, wanted in ((1, {2}), (2, {2, 4}), (4, {1, 2, 4, 6}), (6, {1, 2, 3, 4, 5, 6})):
        assert set(best_blocks(scores, free, count).flatten().tolist()) == wanted


@pytest.mark.parametrize(
    "sizes", [(64, 32, 16), (64, 16, 16), (64, 48, 16), (16, 32, 4), (16, 8, 8)]
)
@pytest.mark.parametrize("width", [1, 3, 17, 40])
def test_block_peaks_are_those_of_the_selectors(sizes, width):
    block, pool, stride = sizes
    cells = torch.rand(1, 2, 3, width, generator=torch.Generator().manual_seed(width))
    num_blocks = -(-((width - 1) * stride + pool) // block)
    geometry = Geometry(num_blocks, block, pool, stride)
    wanted = windows_to_blocks(cells, geometry).clamp(min=0.0)
    assert torch.equal(subject._block_peaks(cells, geometry), wanted)
