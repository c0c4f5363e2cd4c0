"""Keys into low-bit summaries by kernels, against the summaries' own code."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels.gpu.low_bit_keys import append_low_bit_keys, extend_low_bit_keys
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.selectors import Geometry
from sparda_compile.selectors.base import empty_summary
from sparda_compile.selectors.lowbit import LowBitKeys, dequantize

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Keys:
    """Two summaries that are to stay alike, and turns of new keys for both."""

    def __init__(self, device, bits, geometry, sizes, dtype=torch.float32):
        self.device, self.geometry, self.dtype = device, geometry, dtype
        self.batch, self.groups, self.dim = sizes
        self.summary = LowBitKeys(bits)
        like = torch.empty(self.batch, self.groups, 1, self.dim, dtype=dtype)
        self.want = empty_summary(self.summary, like, geometry)
        for tensor in self.want:
            tensor.fill_(7)  # what is not complete yet is nobody's: it must stay
        self.got = [tensor.clone().to(device) for tensor in self.want]
        self.lengths = torch.zeros(self.batch, dtype=torch.int32)

    def turn(self, mask, layout="plain"):
        shape = (self.batch, self.groups, mask.shape[1], self.dim)
        k = torch.randn(shape).to(self.dtype)
        if layout == "transposed":
            k = k.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "gaps":
            k = torch.randn(*shape[:3], 2 * self.dim).to(self.dtype)[..., ::2]
        k.masked_fill_(~mask[:, None, :, None], float("nan"))
        tokens = [part.to(self.device) for part in number_tokens(mask, self.lengths)]
        self.summary.extend(self.want, k, self.lengths, mask, self.geometry)
        on_device = (k.to(self.device), tokens, self.lengths.to(self.device))
        extend_low_bit_keys(*on_device, self.got, self.geometry)
        self.lengths += mask.sum(1).int()

    def step(self):
        k = torch.randn(self.batch, 1, self.groups, self.dim).to(self.dtype).transpose(1, 2)
        self.summary.extend(self.want, k, self.lengths, None, self.geometry)
        length = self.lengths.to(self.device)
        append_low_bit_keys(k.to(self.device), length, self.got, self.geometry)
        self.lengths += 1

    def check(self):
        got = [tensor.cpu() for tensor in self.got]
        assert torch.equal(got[3], self.want[3])
        if self.dtype is torch.bfloat16 and self.device == "cpu":
            self.check_rounded(got)
            return
        for one, other in zip(got, self.want, strict=True):
            assert torch.equal(one, other)

    def check_rounded(self, got):
        """The interpreter rounds to bfloat16 otherwise: codes may differ by one, keys hardly."""
        size, bits = self.geometry.block_size, self.summary.bits
        for row, length in enumerate(self.lengths.tolist()):
            full = length // size
            near, want = (
                dequantize(*(t[row, :, :full] for t in part[:3]), bits).float()
                for part in (got, self.want)
            )
            spread = self.want[1][row, :, :full, None].float() / 2**bits
            assert ((near - want).abs() <= 1.3 * spread + 1e-3).all()
            for one, other in zip(got[:3], self.want[:3], strict=True):
                assert torch.equal(one[row, :, full:], other[row, :, full:])


MASKS = [
    torch.arange(70) >= torch.tensor([[0], [33]]),
    torch.arange(40) % torch.tensor([[3], [5]]) > 0,
    torch.arange(2) >= torch.tensor([[1], [2]]),
    torch.arange(50) < torch.tensor([[50], [7]]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "size", "dim", "layout"),
    [(2, 16, 12, "plain"), (4, 48, 20, "transposed"), (2, 48, 72, "gaps"), (4, 16, 8, "plain")],
)
def test_ragged_turns_and_steps_equal_the_summary(device, bits, size, dim, layout, dtype):
    """Sizes that are no power of two, and more channels than one program has."""
    keys = Keys(device, bits, Geometry(14, size, 8, 4), (2, 1, dim), dtype)
    for mask in MASKS:
        keys.turn(mask, layout)
        keys.check()
        keys.step()
        keys.check()


@pytest.mark.parametrize("bits", [2, 4])
def test_each_step_of_a_block_equals_the_summary(device, bits):
    keys = Keys(device, bits, Geometry(5, 16, 8, 4), (3, 2, 12), torch.float16)
    keys.lengths = torch.tensor([0, 9, 33], dtype=torch.int32)
    for _ in range(18):
        keys.step()
        keys.check()
    assert all((tensor[:, :, 4] == 7).all() for tensor in keys.got[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4])
def test_bits_are_the_same_however_a_text_is_cut(device, bits, dtype):
    geometry = Geometry(6, 16, 8, 4)
    k = torch.randn(1, 1, 70, 12, device=device).to(dtype)
    found = []
    for turns in ((70,), (1,) * 70, (7, 1, 1, 33, 2, 26), (16, 16, 38)):
        tensors = empty_summary(LowBitKeys(bits), k, geometry)
        length = torch.zeros(1, dtype=torch.int32, device=device)
        for part in k.split(turns, 2):
            if part.shape[2] == 1:
                append_low_bit_keys(part, length, tensors, geometry)
            else:
                mask = torch.ones(1, part.shape[2], dtype=torch.bool, device=device)
                tokens = number_tokens(mask, length)
                extend_low_bit_keys(part, tokens, length, tensors, geometry)
            length += part.shape[2]
        found.append(tensors)
    for other in found[1:]:
        assert all(map(torch.equal, found[0][:3], other[:3]))
        assert torch.equal(found[0][3][:, :, :6], other[3][:, :, :6])


def test_constant_and_extreme_channels_give_finite_codes(device):
    k = torch.randn(1, 1, 16, 4).half()
    k[..., 1], k[..., 5:7, 2], k[..., 3] = 2.5, 6e4, torch.tensor([-6.5e4, 6.5e4] * 8)
    geometry, mask = Geometry(2, 16, 8, 4), torch.ones(1, 16, dtype=torch.bool)
    got = [tensor.to(device) for tensor in empty_summary(LowBitKeys(2), k, geometry)]
    tokens = [part.to(device) for part in number_tokens(mask, torch.zeros(1, dtype=torch.int32))]
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    extend_low_bit_keys(k.to(device), tokens, nothing, got, geometry)
    near = dequantize(*(tensor[0, 0, 0].cpu() for tensor in got[:3]), 2)
    assert near.isfinite().all()
    assert near[:, 1].eq(2.5).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "size", "dim"), [(2, 64, 128), (4, 64, 128), (2, 128, 256)])
def test_large_shapes(device, bits, size, dim, dtype):
    keys = Keys(device, bits, Geometry(64, size, 32, 16), (2, 2, dim), dtype)
    keys.turn(torch.arange(60 * size - 7) >= torch.tensor([[0], [501]]), "transposed")
    keys.check()
    for _ in range(20):
        keys.step()
    keys.check()
