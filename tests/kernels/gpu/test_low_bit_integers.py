"""Masses of blocks of products of 8-bit integers, beside the same steps in PyTorch."""

import math

import pytest
import torch

from sparda_compile.kernels.gpu import low_bit_integers
from sparda_compile.kernels.gpu.low_bit_integers import (
    fits_integers,
    integer_masses,
    integer_parts,
)
from sparda_compile.kernels.gpu.low_bit_score import score_low_bit, score_low_bit_forecast
from sparda_compile.selectors import SELECTORS, Geometry
from sparda_compile.selectors.lowbit import dequantize, quantize

needs_integers = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a CUDA GPU that multiplies 8-bit integers",
)
GROUP = 16


class Case:
    """Keys of random channels, a few of them far wider than the others, in few bits."""

    def __init__(self, bits, lengths, sizes, dtype=torch.bfloat16, size=64):
        self.generator = torch.Generator().manual_seed(bits)
        self.bits, self.size, (self.groups, self.repeat, self.dim) = bits, size, sizes
        self.num_blocks = -(-max(lengths) // size)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        shape = (len(lengths), self.groups, self.num_blocks, size, self.dim)
        wide = torch.randn(1, self.groups, 1, 1, self.dim, generator=self.generator).exp()
        self.keys = (torch.randn(shape, generator=self.generator) * wide + wide).to(dtype)
        self.factor = self.dim**-0.5 / math.log(2)

    def summary(self):
        codes, span, base = quantize(self.keys, self.bits)
        opened = self.keys[:, :, 0].clone()
        for row, length in enumerate(self.lengths.tolist()):
            full = length // self.size
            codes[row, :, full:] = 0x5A
            for tensor in (span, base):
                tensor[row, :, full:] = math.nan
        return [codes, span, base, opened]

    def query(self):
        batch, heads = len(self.lengths), self.groups * self.repeat
        numbers = torch.randn(batch, 1, heads, self.dim, generator=self.generator)
        return (1.5 * numbers).to(self.keys.dtype).transpose(1, 2)

    def run(self, query, tensors):
        """Return masses [B, G, N, heads] of full blocks, -inf elsewhere; and parts' sums."""
        batch, codes = len(self.lengths), tensors[0]
        parts, rows = integer_parts(query.cuda(), codes.cuda())
        pairs = batch * self.groups
        masses = torch.full((pairs, self.num_blocks, rows), -math.inf, device="cuda")
        maxima = torch.full((pairs, parts, rows), math.nan, device="cuda")
        out = (masses, maxima, maxima.clone())
        on_device = [tensor.cuda() for tensor in tensors]
        lengths = self.lengths.cuda()
        integer_masses(query.cuda(), on_device, lengths, self.factor, out, softmax=True)
        shape = (batch, self.groups, -1, rows)
        return [each.cpu().view(shape)[..., : self.repeat] for each in out]


def expected(case, query, tensors):
    """Return masses by the formulas of the kernel's page, float64, and a unit of rounding."""
    codes, span, base, _ = tensors
    is_full = torch.arange(case.num_blocks) < (case.lengths // case.size)[:, None]
    span, base = (each.where(is_full[:, None, :, None], 0.0).float() for each in (span, base))
    short = -case.num_blocks % GROUP
    wide = torch.nn.functional.pad(span, (0, 0, 0, short)).unflatten(2, (-1, GROUP)).amax(3)
    wide = wide.repeat_interleave(GROUP, 2)[:, :, : case.num_blocks]
    u = (span * (1 / wide).where(wide > 0, 0.0)).half().float()
    q = query[:, :, 0].unflatten(1, (case.groups, case.repeat)).float()
    scaled = q[:, :, None] * wide[:, :, :, None]
    largest = scaled.abs().amax(-1, keepdim=True)
    v = (scaled * (127 / largest).where(largest > 0, 0.0)).half().float()
    whole = (v * u[:, :, :, None]).round().double()
    shifts = torch.arange(0, 8, case.bits, dtype=torch.int32)
    each = (codes.int().unsqueeze(-2) >> shifts[:, None] & (2**case.bits - 1)).flatten(-3, -2)
    unit = largest.double() / 127 / 2**case.bits
    middle = (2**case.bits - 1) / 2
    dots = torch.einsum("bgnhd,bgnpd->bgnhp", whole, each.double() - middle) * unit
    middles = base.double() + (1 + middle / 2**case.bits) * span.double()
    dots = dots + torch.einsum("bghd,bgnd->bgnh", q.double(), middles)[..., None]
    masses = torch.logsumexp(dots * case.factor * math.log(2), -1)
    masses = masses / math.log(2)
    return masses.masked_fill(~is_full[:, None, :, None], -math.inf), unit[..., 0] * case.factor


@needs_integers
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("repeat", [1, 3, 8, 9, 16])
@pytest.mark.parametrize("bits", [2, 4])
def test_kernel_equals_its_formulas(bits, repeat, dtype):
    """A sequence that ends in a group of blocks, one at its end, and one of no full block."""
    case = Case(bits, [64 * 77 + 5, 64 * 32, 63], (2, repeat, 128), dtype)
    check(case)


@needs_integers
@pytest.mark.gpu
@pytest.mark.parametrize("size", [16, 32, 48, 128])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 256])
@pytest.mark.parametrize("bits", [2, 4])
def test_sizes(bits, dim, size):
    for repeat in (2, 12):
        check(Case(bits, [size * 21 + 7, size * 40], (1, repeat, dim), size=size))


def check(case):
    query, tensors = case.query(), case.summary()
    got, maxima, sums = case.run(query, tensors)
    want, unit = expected(case, query, tensors)
    full = want.isfinite()
    assert torch.equal(got.isfinite(), full)
    # A quotient that the GPU rounds otherwise moves an integer by one, and a sum by its code.
    allowed = (2 * 2**case.bits * unit + 2e-3).expand_as(want)
    assert ((got - want).abs()[full] <= allowed[full]).all()
    everything = torch.logsumexp(got.double() * math.log(2), 2)
    found = (sums.double().log() + maxima.double() * math.log(2)).logsumexp(2)
    torch.testing.assert_close(found, everything, rtol=1e-5, atol=1e-4)


@needs_integers
@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "most"), [(2, 0.01), (4, 0.1)])
def test_integers_move_a_mass_by_a_part_of_what_codes_do(bits, most):
    """Beside products of k' in double precision, and those of the keys themselves."""
    case = Case(bits, [64 * 160] * 2, (2, 16, 128))
    query, tensors = case.query(), case.summary()
    got = case.run(query, tensors)[0].double()
    q = query[:, :, 0].unflatten(1, (2, 16)).double()

    def masses(keys):
        logits = torch.einsum("bghd,bgnpd->bgnhp", q, keys.double())
        return torch.logsumexp(logits * case.factor * math.log(2), -1) / math.log(2)

    near = masses(dequantize(*tensors[:3], bits))
    by_integers, by_codes = (got - near).square().mean(), (near - masses(case.keys)).square().mean()
    assert 0 < by_integers < most * by_codes


@needs_integers
@pytest.mark.gpu
def test_a_block_that_is_no_number_leaves_others_as_they_are():
    case = Case(2, [64 * 40], (1, 16, 64))
    query, tensors = case.query(), case.summary()
    want = case.run(query, tensors)[0]
    for tensor in tensors[1:3]:
        tensor[0, 0, 21, 7] = math.nan
    got = case.run(query, tensors)[0]
    assert got[0, 0, 21].isnan().all()
    others = torch.arange(40) != 21
    # The widest of its channel is another block's, or the same.
    torch.testing.assert_close(got[0, 0, others], want[0, 0, others], rtol=0, atol=0.05)
    assert torch.equal(got[0, 0, :16], want[0, 0, :16])


@needs_integers
@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("length", [0, 64 * 20, 64 * 5000 + 3])
def test_scores_are_those_of_the_selector(bits, length):
    """Among them those of more parts than the second kernel reads at once."""
    case = Case(bits, [max(length, 64)], (1, 4, 64))
    case.lengths[0] = length
    query, tensors = case.query(), case.summary()
    geometry = Geometry(case.num_blocks, 64, 32, 16)
    on_device = [tensor.cuda() for tensor in tensors]
    for name, launch, asked in (
        (f"lowbit{bits}", score_low_bit, query),
        (f"lowbit{bits}_forecast", score_low_bit_forecast, query[:, :1]),
    ):
        want = SELECTORS[name].score(asked.float(), tensors, case.lengths, 0.125, geometry)
        got = torch.full(want.shape, math.nan, device="cuda")
        launch(asked.cuda(), on_device, case.lengths.cuda(), 0.125, geometry, got)
        full = want.isfinite()
        assert torch.equal(got.cpu().isfinite(), full)
        torch.testing.assert_close(got.cpu()[full], want[full], rtol=0.1, atol=0.05)


@needs_integers
@pytest.mark.gpu
def test_a_block_has_the_same_mass_in_programs_of_other_sizes(monkeypatch):
    case = Case(2, [64 * 77], (1, 16, 128))
    query, tensors = case.query(), case.summary()
    got = []
    for programs in (1, 5, 2048):
        monkeypatch.setattr(low_bit_integers, "_PROGRAMS", programs)
        got.append(case.run(query, tensors)[0])
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


@pytest.mark.parametrize(
    ("dtype", "repeat", "dim", "fits"),
    [
        (torch.bfloat16, 16, 128, True),
        (torch.float16, 1, 256, True),
        (torch.float32, 16, 128, False),
        (torch.bfloat16, 17, 128, False),
        (torch.bfloat16, 4, 72, False),
        (torch.bfloat16, 4, 272, False),
    ],
)
def test_what_is_multiplied_as_integers(monkeypatch, dtype, repeat, dim, fits):
    monkeypatch.setattr(low_bit_integers, "interpreting", lambda: False)
    query = torch.empty(1, 2 * repeat, 1, dim, dtype=dtype)
    codes = torch.empty(1, 2, 8, 16, dim, dtype=torch.uint8)
    assert not fits_integers(query, codes)  # on a CPU
    monkeypatch.setattr(low_bit_integers, "_has_integers", lambda device: True)
    assert fits_integers(query, codes) is fits


@pytest.mark.parametrize(
    ("batch", "num_blocks", "parts"),
    [(1, 10, 3), (1, 2048, 512), (4, 2048, 256), (16, 2048, 128), (64, 100, 25), (1, 16384, 1024)],
)
def test_parts_fill_the_gpu(batch, num_blocks, parts):
    codes = torch.empty(batch, 2, num_blocks, 16, 64, dtype=torch.uint8, device="meta")
    assert integer_parts(torch.empty(batch, 32, 1, 64, device="meta"), codes) == (parts, 16)
    assert integer_parts(torch.empty(batch, 2, 1, 64, device="meta"), codes) == (parts, 8)
