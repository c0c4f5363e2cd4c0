from __future__ import annotations

import pytest
import torch

from sparda_compile.formats.int4 import Int4Format

FOUND = Int4Format()


@pytest.mark.parametrize("kind", ["plain", "hard"])
def test_error_is_within_the_bound(blocks, kind):
    for dtype in blocks.dtypes:
        for size, dim in blocks.sizes:
            blocks.check(FOUND, getattr(blocks, kind)(size, dim, dtype))


def test_what_is_not_finite_is_nan_along_its_line(blocks):
    blocks.check_not_finite(FOUND)


def test_zeros_and_denormals(blocks):
    blocks.check_zeros_and_the_smallest(FOUND)


def test_bytes_are_a_quarter_of_16_bits_and_two_numbers_for_each_line():
    assert FOUND.num_bytes(64, 128, torch.bfloat16) == 64 * 128 + 4 * (64 + 128)


def test_codes_of_a_line():
    x = torch.zeros(2, 16, 64)
    x[0, :4, 5] = torch.tensor([-1.0, 14.0, 2.5, 6.0])
    run = FOUND.pack(x)[: 8 * 64].view(8, 64)[:2, 5]
    assert run.tolist() == [15 << 4 | 0, 7 << 4 | 4]  # 3.5 is a tie, to the even one


def test_what_all_of_a_line_have_in_common_costs_nothing(blocks):
    x = blocks.plain(64, 128, torch.float32)
    x[:, 0] = x[:, 0] * 2.0**-5 + torch.arange(128)  # keys with an offset in each channel
    error = (blocks.read(FOUND, x) - x).abs()[:, 0]
    assert float(error.max()) < 2.0**-5 / 3


def test_numbers_further_apart_than_float32_goes_are_nan(blocks):
    x = blocks.plain(16, 64, torch.float32)
    x[0, 0, 0, 0], x[0, 0, 1, 0] = 3e38, -3e38
    y = blocks.read(FOUND, x)
    assert y[0, 0, :, 0].isnan().all()
    assert y[0, 0, :, 1:].isfinite().all()


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_storing_again_around_a_power_of_two(blocks, dtype, bits):
    """Where codes lie as near to each other as numbers, which are further apart above it."""
    blocks.check_around_one(FOUND, dtype, bits, 60)


def test_error(blocks):
    assert 0.07 < blocks.rms(FOUND) < 0.12
