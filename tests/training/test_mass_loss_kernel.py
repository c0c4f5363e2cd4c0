"""The fused loss on low-bit keys against the plain one, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.training.loss import first_supervised
from sparda_compile.training.mass_loss import backward_mass_loss, near_keys

pytest.importorskip("triton")

from sparda_compile.training import mass_loss_kernel
from sparda_compile.training.mass_loss_kernel import block_logs, launch_mass_loss

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="runs the kernel in Triton's interpreter, which is off where there is a GPU",
)
CONFIG = SpardaConfig(
    selector="lowbit2", block_size=16, sink_blocks=1, local_blocks=1, top_k=2, lowering="eager"
)


def draw(batch, heads, groups, tokens, dim, dtype=torch.float32, device="cpu"):
    """As a model makes them: heads are a transposed view."""
    generator = torch.Generator().manual_seed(3)

    def normal(heads):
        drawn = torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype)
        return drawn.to(device).transpose(1, 2)

    return normal(groups), normal(heads), normal(groups)


def both(drawn, config, scale, **options):
    """Return loss and gradient by the fused and by the plain loss."""
    found = []
    for backend in ("triton", "plain"):
        forecast = drawn[0].clone().requires_grad_()
        loss = backward_mass_loss(forecast, *drawn[1:], config, scale, backend=backend, **options)
        found.append((loss, forecast.grad))
    return found


@interpreted
@pytest.mark.parametrize(
    ("shape", "sizes", "options"),
    [
        # One tile of queries and more, lengths that are no multiples of tiles and blocks.
        ((2, 4, 1, 150, 64), (16, 1, 1), {}),
        ((1, 3, 1, 203, 96), (32, 1, 2), {"teacher": "query"}),
        ((1, 2, 2, 300, 16), (64, 1, 1), {"softcap": 0.5}),
        ((1, 6, 2, 131, 20), (16, 2, 3), {"teacher": "query", "weight": 0.25}),
        ((1, 1, 1, 270, 80), (48, 1, 0), {}),
        ((1, 2, 1, 150, 128), (32, 0, 1), {"last_tokens": 33}),
        ((1, 2, 1, 530, 16), (128, 1, 1), {"last_tokens": 70}),
        ((1, 3, 3, 149, 8), (16, 0, 0), {"last_tokens": 1}),
    ],
)  # fmt: skip
def test_the_fused_loss_is_the_plain_one(shape, sizes, options):
    size, sink, local = sizes
    config = CONFIG.replace(block_size=size, sink_blocks=sink, local_blocks=local)
    (loss, gradient), (want, expected) = both(draw(*shape), config, 0.3, **options)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-9)
    assert want > 0.0
    assert expected.any()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=2e-6 * expected.abs().max())
