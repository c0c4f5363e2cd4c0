"""Low-bit keys by one kernel: the bits that the summaries' own code makes."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.training.mass_loss import near_keys

pytest.importorskip("triton")


def draw(tokens, dim, dtype):
    """Heads are a transposed view, one channel is constant, and one almost."""
    generator = torch.Generator().manual_seed(5)
    k = torch.randn(2, tokens, 3, dim, generator=generator)
    k[..., 1] = 0.7
    k[..., 2] *= 1e-7
    return k.to(dtype).transpose(1, 2)


def check(k, selector, size):
    config = SpardaConfig(selector=selector, block_size=size)
    want = near_keys(k, config, "plain")
    assert want.shape[2] == k.shape[2] // size * size
    return near_keys(k, config, "triton"), want


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4"])
@pytest.mark.parametrize(
    ("tokens", "dim", "size", "dtype"),
    [
        (70, 8, 16, torch.float32),
        (150, 80, 48, torch.float32),
        (64, 12, 64, torch.float16),
        (70, 16, 32, torch.bfloat16),
        (15, 8, 16, torch.float32),
    ],
)
def test_it_is_bit_equal(selector, tokens, dim, size, dtype):
    got, want = check(draw(tokens, dim, dtype), selector, size)
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4"])
def test_it_is_bit_equal_on_a_gpu(selector, dtype):
    for dim, size in ((64, 64), (96, 48), (128, 16)):
        got, want = check(draw(8191, dim, dtype).cuda(), selector, size)
        assert torch.equal(got, want)
