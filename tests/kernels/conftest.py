from __future__ import annotations

import pytest
import torch

# Largest relative RMS error against fp64.
BUDGETS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def assert_near():
    def check(got, want, dtype):
        assert torch.isfinite(got).all()
        error = (got.double() - want).square().mean().sqrt()
        size = want.square().mean().sqrt()
        assert error <= BUDGETS[dtype] * size + 1e-12, f"relative RMS {error / size:.2e}"

    return check
