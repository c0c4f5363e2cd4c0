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


def test_bytes_are_those_of_int8():
    assert FOUND.num_bytes(64, 128, torch.bfloat16) == 2 * 64 * 128 + 2 * (64 + 128)


def test_codes_of_a_line(blocks):
    x = torch.zeros(2, 16, 64)
    x[0, :4, 5] = torch.tensor([-448.0, 240.0, 2.0**-9, 1.0625])
    run = FOUND.pack(x)[: 16 * 64].view(torch.float8_e4m3fn).float().view(16, 64)
    assert run[:4, 5].tolist() == [-448.0, 240.0, 2.0**-9, 1.0]  # a tie, to the even one
    assert torch.equal(blocks.read(FOUND, x)[0], run)


def test_small_numbers_beside_large_ones_keep_their_precision(blocks):
    x = torch.full((2, 16, 64), 1.7)
    x[0, 0], x[1, :, 0] = 100.0, 100.0
    error = (blocks.read(FOUND, x) - x).abs() / x
    assert float(error.max()) < 1 / 16


def test_error_is_what_is_published(blocks):
    """About 2.7% of the size of elements."""
    assert 0.024 < blocks.rms(FOUND) < 0.030
