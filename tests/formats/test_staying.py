from __future__ import annotations

import pytest
import torch

from sparda_compile.formats.int4 import Int4Format
from sparda_compile.formats.int8 import Int8Format
from sparda_compile.formats.staying import Values4Format, Values8Format
from sparda_compile.selectors.lowbit import quantize

BOTH = [(Values8Format(), Int8Format()), (Values4Format(), Int4Format())]


@pytest.fixture(params=BOTH, ids=["values8", "values4"])
def pair(request):
    """A format, and that of its values."""
    return request.param


@pytest.mark.parametrize("kind", ["plain", "hard"])
def test_error_is_within_the_bound(blocks, pair, kind):
    found, _ = pair
    for dtype in blocks.dtypes:
        for size, dim in blocks.sizes:
            x = getattr(blocks, kind)(size, dim, dtype)
            y = found.rounded(x)
            error, bound = (y.float() - x.float()).abs(), found.bound(x)
            assert (error <= bound).all(), float((error / bound).max())
            nearest = [(error / bound)[:, part].amax() for part in (0, 1)]
            assert min(nearest) > 0.6


def test_what_is_read_is_what_was_rounded(blocks, pair):
    """Values from the run alone, keys from what the selector keeps of them."""
    found, of_values = pair
    x = blocks.hard(48, 96, torch.bfloat16)
    keys, stored = quantize(x[:, 0], 4), found.pack(x)
    y = found.read(stored, keys, 48, 96, x.dtype)
    assert torch.equal(y, found.rounded(x))
    assert torch.equal(y[:, 1], of_values.rounded(x)[:, 1])
    assert found.unpack(stored, 48, 96, x.dtype)[:, 0].isnan().all()
    # Another block's keys do not change the values, and the run does not know of keys.
    assert torch.equal(found.pack(torch.stack([x[:, 1], x[:, 1]], 1)), stored)


def test_bytes_are_those_of_the_values_and_their_scales():
    size, dim = 64, 128
    assert BOTH[0][0].num_bytes(size, dim, torch.bfloat16) == size * dim + 2 * size
    assert BOTH[1][0].num_bytes(size, dim, torch.bfloat16) == size * dim // 2 + 4 * size


def test_a_key_that_is_nan_makes_its_channel_nan(blocks, pair):
    found, _ = pair
    x = blocks.plain(32, 64, torch.bfloat16)
    want = found.rounded(x)
    x[0, 0, 7, 9] = x[0, 1, 11, 13] = float("nan")
    y = found.rounded(x)
    broken = torch.zeros_like(x, dtype=torch.bool)
    broken[0, 0, :, 9] = broken[0, 1, 11] = True
    assert y[broken].isnan().all()
    assert torch.equal(y[~broken], want[~broken])


def test_an_infinite_key_is_felt_in_its_channel_alone(blocks, pair):
    found, _ = pair
    x = blocks.plain(32, 64, torch.bfloat16)
    want = found.rounded(x)
    x[0, 0, 7, 9] = float("inf")
    others = torch.arange(64) != 9
    assert torch.equal(found.rounded(x)[..., others], want[..., others])


def test_zeros_and_denormals(blocks, pair):
    found, _ = pair
    zeros = torch.zeros(2, 2, 16, 64, dtype=torch.bfloat16)
    assert torch.equal(found.rounded(zeros), zeros)
    info = torch.finfo(torch.bfloat16)
    x = (blocks.plain(16, 64, torch.float32) * 20 * info.smallest_normal * info.eps).bfloat16()
    assert ((found.rounded(x).float() - x.float()).abs() <= found.bound(x)).all()


@pytest.mark.parametrize("ends", [(-0.6, 0.6), (-0.97, 0.99), (0.0, 0.98), (-0.98, 0.01)])
def test_a_channel_nearly_as_wide_as_its_dtype_loses_an_end_at_most(blocks, pair, ends):
    found, _ = pair
    x = blocks.plain(32, 64, torch.float16)
    x[:, 0] = torch.empty_like(x[:, 0]).uniform_(*ends) * torch.finfo(x.dtype).max
    y = found.rounded(x)
    error = (y.double() - x.double()).abs()
    assert (error <= found.bound(x)).all()
    assert y.isfinite().all()


def test_error_of_keys_is_that_of_int4(blocks, pair):
    found, of_values = pair
    x = blocks.plain(64, 128, torch.bfloat16)

    def rms(y, half):
        error = (y - x)[:, half].float()
        return float((error.square().mean() / x[:, half].float().square().mean()).sqrt())

    assert rms(found.rounded(x), 0) == pytest.approx(rms(Int4Format().rounded(x), 0), rel=0.02)
    assert rms(found.rounded(x), 1) == rms(of_values.rounded(x), 1)
