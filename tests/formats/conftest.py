"""Blocks that are hard to round, and what every format that rounds has to do with them."""

from __future__ import annotations

import pytest
import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Blocks of all sizes and heads, some of which no power of two measures.
SIZES = ((16, 64), (48, 96), (64, 128), (112, 72), (128, 256))


class Blocks:
    """What is made of a seed, and checks that hold for each format."""

    dtypes = DTYPES
    sizes = SIZES

    def plain(self, size, dim, dtype, seed=0):
        """Return three blocks, [3, 2, P, D], of normal numbers."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(3, 2, size, dim, generator=generator).to(dtype)

    def hard(self, size, dim, dtype, seed=0):
        """Return the same with outliers, an offset, constants, zeros and tiny numbers."""
        x = self.plain(size, dim, torch.float32, seed)
        x[0, 0, :, 5] *= 1000.0  # a channel, and a token
        x[0, 1, 3] *= 1000.0
        x[1] = 1.0 + x[1] * 2.0**-8  # near a power of two, where numbers change their distance
        x[1, :, 4], x[1, :, :, 6] = -3.0, 0.0
        x[2] *= 1e-6
        return x.to(dtype)

    def read(self, found, x):
        """Return blocks as they are read back."""
        return found.rounded(x)

    def check(self, found, x):
        """What is read back is within the bound, and stays what it is when it is stored again."""
        size, dim = x.shape[-2:]
        stored = found.pack(x)
        (num_bytes,), dtype = found.stored(size, dim, x.dtype)
        assert (stored.shape, stored.dtype) == ((*x.shape[:-3], num_bytes), dtype)
        assert num_bytes == found.num_bytes(size, dim, x.dtype) == stored[0].nbytes
        assert num_bytes % 16 == 0
        y = self.read(found, x)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        error, bound = (y.float() - x.float()).abs(), found.bound(x)
        assert (error <= bound).all(), float((error / bound).max())
        # A bound that nothing comes near says nothing.
        assert float((error / bound).max()) > 0.8
        assert torch.equal(self.read(found, y), y)

    def check_around_one(self, found, dtype, bits, count):
        """Lines of keys from below 1 to above it are rounded, and stored again as they are.

        `bits` are those of the dtype's fraction below 1; ends are so many numbers from 1.
        """
        low = 1 - torch.arange(count) * 2.0**-bits
        high = 1 + torch.arange(count) * 2.0 ** (1 - bits)
        share = torch.linspace(0, 1, 256)[:, None]
        lines = torch.cartesian_prod(low, high)
        keys = (lines[:, 0] * (1 - share) + lines[:, 1] * share).to(dtype)
        x = torch.stack([keys, torch.zeros_like(keys)])
        y = self.read(found, x)
        assert not torch.equal(y, x)
        assert torch.equal(self.read(found, y), y)

    def check_not_finite(self, found):
        """A channel of keys and a token of values that are not finite are NaN, no others."""
        for value in (float("nan"), float("inf"), float("-inf")):
            x = self.plain(32, 64, torch.bfloat16)
            want = self.read(found, x)
            x[0, 0, 7, 9] = x[0, 1, 11, 13] = value
            y = self.read(found, x)
            broken = torch.zeros_like(x, dtype=torch.bool)
            broken[0, 0, :, 9] = broken[0, 1, 11] = True
            assert y[broken].isnan().all()
            assert torch.equal(y[~broken], want[~broken])
            assert found.bound(x)[broken].isnan().all()

    def check_zeros_and_the_smallest(self, found):
        """Zeros stay, and denormals are within their own distance."""
        for dtype in (torch.bfloat16, torch.float16):
            x = self.plain(16, 64, torch.float32)
            x[:, :, ::2] = 0.0
            x = (x * 20 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps).to(dtype)
            assert (x != 0).any()
            y = self.read(found, x)
            assert ((y.float() - x.float()).abs() <= found.bound(x)).all()
            zeros = torch.zeros(2, 2, 16, 64, dtype=dtype)
            assert torch.equal(self.read(found, zeros), zeros)

    def rms(self, found):
        """Return the error of normal numbers in bf16, relative to their size."""
        x = self.plain(64, 128, torch.bfloat16).float()
        error = self.read(found, x.bfloat16()).float() - x
        return float((error.square().mean() / x.square().mean()).sqrt())


@pytest.fixture(scope="session")
def blocks():
    return Blocks()
