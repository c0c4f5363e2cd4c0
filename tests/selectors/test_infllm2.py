from __future__ import annotations

import math

import pytest
import torch

from sparda_compile.selectors.base import Geometry
from sparda_compile.selectors.infllm2 import InfLLM2

GEOMETRY = Geometry(5, 16, 8, 4)


@pytest.mark.parametrize("length", [0, 7, 8, 41, 80])
@pytest.mark.parametrize("repeat", [1, 3, 7])
def test_scores_follow_the_formula(length, repeat):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2 * repeat, 1, 60, generator=generator)
    pooled = torch.randn(1, 2, GEOMETRY.num_windows, 60, generator=generator)
    num_windows = max((length - 8) // 4 + 1, 0)
    got = InfLLM2().score(query, [pooled], torch.tensor([length]), 0.3, GEOMETRY)
    assert got.shape == (1, 2, 5)
    assert got.dtype == torch.float32
    for group in range(2):
        windows = [0.0] * num_windows
        for head in range(group * repeat, (group + 1) * repeat):
            logits = [
                float(query[0, head, 0].double() @ pooled[0, group, j].double()) * 0.3
                for j in range(num_windows)
            ]
            total = sum(math.exp(x - max(logits)) for x in logits)
            windows = [
                w + math.exp(x - max(logits)) / total for w, x in zip(windows, logits, strict=True)
            ]
        for m in range(5):
            touching = [w for j, w in enumerate(windows) if 4 * m - 1 <= j <= 4 * m + 3]
            want = max(touching, default=-math.inf)
            assert got[0, group, m].item() == pytest.approx(want, rel=1e-4, abs=1e-7)


def test_rows_see_their_own_windows_only():
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 2, 1, 4, generator=generator)
    pooled = torch.randn(2, 1, GEOMETRY.num_windows, 4, generator=generator)
    lengths = torch.tensor([80, 20])
    both = InfLLM2().score(query, [pooled], lengths, 1.0, GEOMETRY)
    for row in range(2):
        one = slice(row, row + 1)
        alone = InfLLM2().score(query[one], [pooled[one]], lengths[one], 1.0, GEOMETRY)
        torch.testing.assert_close(both[one], alone)
    assert both[1, 0, 2:].eq(-math.inf).all()
    assert both[0].isfinite().all()
