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
from sparda_compile.training.mass_loss_kernel import launch_mass_loss

CONFIG = SpardaConfig(
    selector="lowbit2", block_size=16, sink_blocks=1, local_blocks=1, top_k=2, lowering="eager"
)


def draw(batch, heads, groups, tokens, dim, dtype=torch.float32, device="cpu", predicted=1):
    """As a model makes them: heads are a transposed view."""
    generator = torch.Generator().manual_seed(3)

    def normal(heads):
        drawn = torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype)
        return drawn.to(device).transpose(1, 2)

    return normal(groups * predicted), normal(heads), normal(groups)


def both(drawn, config, scale, **options):
    """Return loss and gradient by the fused and by the plain loss."""
    found = []
    for backend in ("triton", "plain"):
        forecast = drawn[0].clone().requires_grad_()
        loss = backward_mass_loss(forecast, *drawn[1:], config, scale, backend=backend, **options)
        found.append((loss, forecast.grad))
    return found


@pytest.mark.usefixtures("interpreted")
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
        ((1, 2, 1, 90, 256), (16, 1, 1), {}),
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


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("shape", "predicted", "sizes", "options"),
    [
        ((2, 4, 1, 150, 64), 2, (16, 1, 1), {}),
        ((1, 3, 1, 203, 96), 3, (32, 1, 2), {"teacher": "query"}),
        ((1, 4, 2, 300, 16), 2, (64, 1, 1), {"softcap": 0.5}),
        ((1, 12, 2, 131, 20), 6, (16, 2, 3), {"teacher": "query", "weight": 0.25}),
        ((1, 3, 1, 170, 80), 3, (48, 1, 0), {}),
        ((1, 2, 1, 150, 128), 2, (32, 0, 1), {"last_tokens": 33}),
        ((1, 2, 1, 530, 16), 2, (128, 1, 1), {"last_tokens": 70}),
        ((1, 6, 3, 149, 8), 2, (16, 0, 0), {"last_tokens": 1}),
    ],
)  # fmt: skip
def test_the_fused_loss_of_several_heads_is_the_plain_one(shape, predicted, sizes, options):
    size, sink, local = sizes
    config = CONFIG.replace(block_size=size, sink_blocks=sink, local_blocks=local)
    drawn = draw(*shape, predicted=predicted)
    (loss, gradient), (want, expected) = both(drawn, config, 0.3, **options)
    torch.testing.assert_close(loss, want, rtol=5e-5, atol=1e-9)
    assert want > 0.0
    assert expected.any()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=4e-6 * expected.abs().max())


@pytest.mark.usefixtures("interpreted")
def test_blocks_that_heads_all_but_leave_out_have_finite_gradients():
    forecast, query, key = draw(1, 2, 1, 120, 8, predicted=2)
    # The sink takes all of the softmax.
    key[:, :, :16] = forecast[:, :1].mean(2, keepdim=True) * 400
    (loss, gradient), (want, expected) = both((forecast, query, key), CONFIG, 30.0)
    torch.testing.assert_close(loss, want, rtol=1e-3, atol=0.0)
    assert gradient.isfinite().all()
    assert expected.isfinite().all()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 0.02)])
def test_half_precision(dtype, tolerance):
    # The interpreter multiplies float32, so shares are not rounded before they meet the keys.
    drawn = draw(2, 3, 1, 150, 16, dtype)
    (loss, gradient), (want, expected) = both(drawn, CONFIG, 0.3)
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, want, rtol=tolerance, atol=0.0)
    assert (gradient - expected).float().norm() < tolerance * expected.float().norm()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("predicted", [1, 2])
def test_ranges_of_queries_change_nothing(monkeypatch, predicted):
    drawn = draw(1, 2, 1, 400, 8, predicted=predicted)
    (loss, gradient), _ = both(drawn, CONFIG, 0.3)
    monkeypatch.setattr(mass_loss_kernel, "_HELD", 1)
    launches = []
    real = mass_loss_kernel.block_logs
    monkeypatch.setattr(
        mass_loss_kernel, "block_logs", lambda *a: launches.append(a[2]) or real(*a)
    )
    (again, parts), _ = both(drawn, CONFIG, 0.3)
    assert launches[::2] == [range(48, 176), range(176, 304), range(304, 400)]
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(parts, gradient, rtol=1e-6, atol=0.0)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("predicted", [1, 2])
def test_queries_without_a_free_block_add_nothing(predicted):
    forecast, query, k = draw(1, 2, 1, 100, 8, predicted=predicted)
    near, first = near_keys(k, CONFIG), first_supervised(CONFIG)
    found = []
    for queries in (range(100), range(first, 100)):
        gradient = torch.zeros_like(forecast)
        loss = launch_mass_loss(
            forecast, query, (k, near), queries, CONFIG, 0.3, 0.0, full_only=False,
            push=(gradient, 1.0),
        )  # fmt: skip
        found.append((loss, gradient))
    assert not found[0][1][:, :, :first].any()
    assert found[0][1].any()
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.usefixtures("interpreted")
def test_only_the_loss_is_computed_where_no_gradient_is_needed():
    forecast, query, k = draw(1, 2, 1, 100, 8)
    loss = backward_mass_loss(forecast, query, k, CONFIG, 0.3, backend="triton")
    want = backward_mass_loss(forecast, query, k, CONFIG, 0.3, backend="plain")
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0.0)


def test_unknown_backends_are_refused():
    with pytest.raises(ConfigError, match="backend='fast' is not known"):
        backward_mass_loss(*draw(1, 1, 1, 100, 8), CONFIG, 0.3, backend="fast")


# Both round the shares to bfloat16 before they meet the keys, but the sums' order differs.
@pytest.mark.gpu
@pytest.mark.parametrize("teacher", ["attention", "query"])
@pytest.mark.parametrize(
    ("shape", "predicted", "size", "options"),
    [
        ((2, 9, 3, 8192, 64), 1, 64, {}),
        ((2, 9, 3, 8192, 64), 3, 64, {}),
        ((1, 8, 2, 8191, 128), 1, 32, {"softcap": 30.0}),
        ((1, 8, 2, 8191, 128), 4, 32, {"softcap": 30.0}),
        ((1, 4, 1, 8000, 96), 1, 16, {"last_tokens": 1000}),
        ((1, 4, 1, 8000, 96), 2, 16, {"last_tokens": 1000}),
        ((1, 3, 3, 4100, 80), 1, 48, {}),
        ((1, 2, 1, 2100, 256), 1, 128, {}),
        ((1, 2, 1, 2100, 256), 2, 128, {}),
    ],
)  # fmt: skip
def test_real_shapes_on_a_gpu_without_a_wait_for_it(shape, predicted, size, options, teacher):
    config = CONFIG.replace(block_size=size, local_blocks=2)
    drawn = draw(*shape, torch.bfloat16, "cuda", predicted)
    scale, options = shape[-1] ** -0.5, options | {"teacher": teacher}
    (loss, gradient), (want, expected) = both(drawn, config, scale, **options)
    torch.testing.assert_close(loss, want, rtol=5e-4, atol=1e-6)
    assert (gradient - expected).float().norm() < 0.01 * expected.float().norm()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward_mass_loss(drawn[0].clone().requires_grad_(), *drawn[1:], config, scale, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
