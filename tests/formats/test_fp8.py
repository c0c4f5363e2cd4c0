from __future__ import annotations

import pytest
import torch

from sparda_compile.formats.fp8 import Fp8Format

FOUND = Fp8Format()


@pytest.mark.parametrize("kind", ["plain", "hard"])
def test_error_is_within_the_bound(blocks, kind):
    for dtype in blocks.dtypes:
        for size, dim in blocks.sizes:
            blocks.check(FOUND, getattr(blocks, kind)(size, dim, dtype))


def test_what_is_not_finite_is_nan_along_its_line(blocks):
    blocks.check_not_finite(FOUND)


def test_zeros_and_denormals(blocks):
    blocks.check_zeros_and_the_smallest(FOUND)


def test_bytes_are_half_of_16_bits_and_two_numbers_a_channel_and_one_a_token():
    num_bytes = FOUND.num_bytes(64, 128, torch.bfloat16)
    assert num_bytes == 2 * 64 * 128 + 2 * (2 * 128 + 64)
    assert num_bytes <= 0.525 * (2 * 64 * 128 * 2)


def test_codes_of_a_line(blocks):
    """Keys between -300 and 212 are about -44, with a unit of 512: a code is two of them."""
    x = torch.zeros(2, 16, 64)
    x[0, :5, 5] = torch.tensor([-300.0, 212.0, -44.0 + 2.0**-8, -44.0 + 2.125, 84.0])
    x[1, 7, :4] = torch.tensor([-96.0, 48.0, 2.0**-9, 1.0625])
    run = FOUND.pack(x)[: 2 * 16 * 64].view(torch.float8_e4m3fn).float().view(2, 16, 64)
    assert run[0, :5, 5].tolist() == [-256.0, 256.0, 2.0**-9, 1.0, 64.0]  # a tie, to the even one
    # Values about 0: the largest is an end, and the unit is 128.
    assert run[1, 7, :4].tolist() == [-256.0, 96.0, 2.0**-8, 2.0]
    read = blocks.read(FOUND, x)
    assert read[0, :5, 5].tolist() == [-300.0, 212.0, -44.0 + 2.0**-8, -42.0, 84.0]
    assert read[1, 7, :4].tolist() == [-96.0, 48.0, 2.0**-9, 1.0]


def test_ends_of_a_line_are_exact(blocks):
    x = blocks.hard(64, 128, torch.bfloat16)
    y = blocks.read(FOUND, x)
    keys, values = x[:, 0], x[:, 1]
    ends = (keys == keys.amin(-2, keepdim=True)) | (keys == keys.amax(-2, keepdim=True))
    assert torch.equal(y[:, 0][ends], keys[ends])
    ends = values.abs() == values.abs().amax(-1, keepdim=True)
    assert torch.equal(y[:, 1][ends], values[ends])


def test_small_numbers_beside_large_ones_keep_their_precision(blocks):
    """Of values: nothing is in a line of keys but how far they are from its middle."""
    x = torch.full((2, 16, 64), 1.7)
    x[1, :, 0] = 100.0
    error = (blocks.read(FOUND, x) - x).abs() / x
    assert 0 < float(error.max()) < 1 / 16


def test_what_keys_of_a_channel_have_in_common_costs_nothing(blocks):
    x = blocks.plain(64, 128, torch.float32)
    x[:, 0] = x[:, 0] * 2.0**-5 + torch.arange(128)
    error = (blocks.read(FOUND, x) - x)[:, 0]
    assert float(error.square().mean().sqrt()) < 0.03 * 2.0**-5


def test_numbers_further_apart_than_float32_goes_are_nan(blocks):
    x = blocks.plain(16, 64, torch.float32)
    x[0, 0, 0, 0], x[0, 0, 1, 0], x[1, 1, 2, 3] = 3e38, -3e38, -2e38
    x[2, 0, 0, 0], x[2, 0, 1, 0] = 3e38, 1.5e38
    y = blocks.read(FOUND, x)
    broken = torch.zeros_like(x, dtype=torch.bool)
    broken[0, 0, :, 0] = broken[1, 1, 2] = True
    assert y[broken].isnan().all()
    assert y[~broken].isfinite().all()
    assert y[2, 0, :2, 0].tolist() == x[2, 0, :2, 0].tolist()


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_storing_again_around_a_power_of_two(blocks, dtype, bits):
    """Where codes lie as near to each other as numbers: with units of (h - l) some would move."""
    blocks.check_around_one(FOUND, dtype, bits, 90)


def test_error_is_what_is_published(blocks):
    """About 2.5% of the size of elements, without anything that keys have in common."""
    assert 0.022 < blocks.rms(FOUND) < 0.028
