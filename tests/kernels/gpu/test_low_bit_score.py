"""Scores by low-bit keys: parts that differ in weight. All sizes are in `test_score.py`."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels.gpu.low_bit_score import score_low_bit, score_low_bit_forecast
from sparda_compile.selectors import SELECTORS, Geometry
from sparda_compile.selectors.base import empty_summary

SIZE = 16
GEOMETRY = Geometry(300, SIZE, 8, 4)


def filled(bits, lengths, k):
    """Return a summary of keys, as the selector makes it."""
    summary = SELECTORS[f"lowbit{bits}"].summary
    tensors = empty_summary(summary, k, GEOMETRY)
    mask = torch.arange(k.shape[2]) < torch.tensor(lengths)[:, None]
    summary.extend(tensors, k, torch.zeros(len(lengths), dtype=torch.int32), mask, GEOMETRY)
    return tensors


def scored(device, launch, query, tensors, lengths, scale):
    got = torch.full((*tensors[0].shape[:3],), float("nan"), device=device)
    on_device = [tensor.to(device) for tensor in tensors]
    launch(query.to(device), on_device, lengths.to(device), scale, GEOMETRY, got)
    return got.cpu()


@pytest.mark.parametrize("bits", [2, 4])
def test_one_part_may_hold_nearly_all_of_the_weight(device, bits):
    """The shares of all blocks add up to the heads, whatever the parts they were summed in."""
    generator = torch.Generator().manual_seed(bits)
    k = torch.randn(2, 1, 300 * SIZE, 12, generator=generator)
    k[0, 0, 4000:4010] *= 30
    k[1, 0, :16] *= 30
    lengths = torch.tensor([4799, 2500], dtype=torch.int32)
    tensors = filled(bits, lengths.tolist(), k)
    query = 8 * torch.randn(2, 3, 1, 12, generator=generator)
    want = SELECTORS[f"lowbit{bits}"].score(query, tensors, lengths, 1.0, GEOMETRY)
    got = scored(device, score_low_bit, query, tensors, lengths, 1.0)
    assert torch.equal(got.isfinite(), want.isfinite())
    assert want.isfinite().sum(-1).flatten().tolist() == [299, 156]
    # Logits of hundreds are known to a few millionths of themselves in float32.
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-4)
    shares = got.where(got.isfinite(), 0.0).sum(-1)
    torch.testing.assert_close(shares, torch.full_like(shares, 3.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_forecast_scores_as_a_query_of_one_head_does(device, bits):
    generator = torch.Generator().manual_seed(bits)
    k = torch.randn(1, 2, 300 * SIZE, 12, generator=generator)
    lengths = torch.tensor([4000], dtype=torch.int32)
    tensors = filled(bits, [4000], k)
    forecast = torch.randn(1, 2, 1, 12, generator=generator)
    level = scored(device, score_low_bit_forecast, forecast, tensors, lengths, 0.4)
    share = scored(device, score_low_bit, forecast, tensors, lengths, 0.4)
    assert level.isfinite().sum(-1).eq(250).all()
    torch.testing.assert_close(level.softmax(-1), share.clamp(min=0.0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("lengths", [[0], [15], [16]])
def test_a_cache_without_a_full_block_has_no_scores(device, lengths):
    tensors = filled(2, lengths, torch.randn(1, 1, 16, 12))
    query = torch.randn(1, 2, 1, 12)
    length = torch.tensor(lengths, dtype=torch.int32)
    got = scored(device, score_low_bit, query, tensors, length, 1.0)
    assert got.isfinite().sum() == lengths[0] // 16
    assert got[~got.isfinite()].eq(float("-inf")).all()
