"""Where kernels run, and how near they have to come: interpreted on the CPU, or on a CUDA GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

HAS_CUDA = torch.cuda.is_available()

# Largest error of an element, relative to the RMS of its sequence. A score is fp32 however its
# summary is stored, but tensor cores sum half-precision products with fewer bits. What attention
# returns has the query's precision, and so have its weights.
TOLERANCES = {
    ("score", torch.float32): 1e-4,
    ("score", torch.float16): 1e-4,
    ("score", torch.bfloat16): 1e-4,
    ("attention", torch.float32): 1e-4,
    ("attention", torch.float16): 4e-3,
    ("attention", torch.bfloat16): 3e-2,
}


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if HAS_CUDA else "cpu"


@pytest.fixture(scope="session")
def assert_close():
    """Check that values [B, ...] are near the wanted ones, and infinite where those are."""

    def check(got, want, kind, dtype):
        got, want = got.cpu().double(), want.double()
        assert got.shape == want.shape
        exists = want.isfinite()
        assert not got.isnan().any()
        assert torch.equal(got[~exists], want[~exists])
        # Sequence by sequence: the longer one is, the smaller is what attention returns.
        error = (got - want).where(exists, 0.0).flatten(1).abs().amax(1)
        total = want.where(exists, 0.0).flatten(1).square().sum(1)
        size = (total / exists.flatten(1).sum(1).clamp(min=1)).sqrt()
        assert (error <= TOLERANCES[kind, dtype] * size).all(), f"errors {error} of {size}"

    return check


@pytest.fixture(autouse=True)
def _poison_gpu_memory() -> Iterator[None]:
    """Fill what kernels' launchers allocate; on the CPU the fixture for all tests does that."""
    if not HAS_CUDA:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
