from __future__ import annotations

import math

import pytest
import torch

from sparda_compile.selectors.base import Geometry
from sparda_compile.selectors.forecast import Forecast

GEOMETRY = Geometry(5, 16, 8, 4)


@pytest.mark.parametrize("length", [0, 7, 8, 41, 80])
def test_scores_are_raw_dot_products(length):
    generator = torch.Generator().manual_seed(0)
    forecast = torch.randn(1, 3, 1, 60, generator=generator)
    pooled = torch.randn(1, 3, GEOMETRY.num_windows, 60, generator=generator)
    got = Forecast().score(forecast, [pooled], torch.tensor([length]), 123.0, GEOMETRY)
    num_windows = max((length - 8) // 4 + 1, 0)
    for group in range(3):
        for m in range(5):
            touching = [
                float(forecast[0, group, 0].double() @ pooled[0, group, j].double())
                for j in range(max(4 * m - 1, 0), min(4 * m + 4, num_windows))
            ]
            want = max(touching, default=-math.inf)
            assert got[0, group, m].item() == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_half_precision_is_scored_in_fp32():
    forecast = torch.full((1, 1, 1, 64), 100.0).half()
    pooled = torch.full((1, 1, GEOMETRY.num_windows, 64), 100.0).half()
    got = Forecast().score(forecast, [pooled], torch.tensor([80]), 1.0, GEOMETRY)
    assert got.eq(640000.0).all()
