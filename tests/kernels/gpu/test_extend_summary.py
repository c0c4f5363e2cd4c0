"""A prompt's keys into the summaries by kernels, against the summaries' own code."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels.gpu.append import SUMMARY_KERNELS
from sparda_compile.kernels.gpu.extend_summary import PROMPT_SUMMARY_KERNELS
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.selectors import SELECTORS, Geometry, summary_named

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WINDOWS = [(8, 4), (6, 3), (4, 4), (16, 2), (32, 16)]


def draw_mask(generator, batch, num_tokens):
    """Return [B, T] bool: the rows are whole, padded on the left, on the right, or have holes."""
    token = torch.arange(num_tokens)
    rows = []
    for row in range(batch):
        cut = int(torch.randint(0, num_tokens + 1, (), generator=generator))
        holes = torch.rand(num_tokens, generator=generator) < 0.6
        rows.append([token >= 0, token >= cut, token < cut, holes][(row + cut) % 4])
    return torch.stack(rows)


class Keys:
    """Two summaries that are to stay alike, and turns of new keys for both."""

    def __init__(self, device, name, geometry, seed, dtype=torch.float16):
        self.device, self.name, self.geometry, self.dtype = device, name, geometry, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.batch, self.groups, self.dim = ((3, 1, 8), (2, 2, 12), (1, 8, 20))[seed % 3]
        shapes = summary_named(name).shapes(geometry, self.dim).values()
        # What is not complete yet is nobody's: it must stay.
        self.want = [self.randn(*shape) for shape in shapes]
        if name == "key_bounds":
            summary_named(name).reset(self.want)
        self.got = [tensor.clone().to(device) for tensor in self.want]
        self.lengths = torch.zeros(self.batch, dtype=torch.int32)

    def randn(self, *shape):
        whole = (self.batch, self.groups, *shape)
        return torch.randn(whole, generator=self.generator).to(self.dtype)

    def turn(self, num_tokens, layout="plain"):
        mask = draw_mask(self.generator, self.batch, num_tokens)
        k = self.randn(num_tokens, self.dim)
        if layout == "transposed":
            k = k.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "gaps":
            k = self.randn(num_tokens, 2 * self.dim)[..., 1::2]
        summary_named(self.name).extend(self.want, k, self.lengths, mask, self.geometry)
        tokens = [t.to(self.device) for t in number_tokens(mask, self.lengths)]
        new = (k.to(self.device), tokens, self.lengths.to(self.device))
        PROMPT_SUMMARY_KERNELS[self.name](*new, self.got, self.geometry)
        self.lengths += mask.sum(1).int()

    def check(self):
        if self.name == "key_bounds":
            assert torch.equal(self.got[0].cpu(), self.want[0])
            return
        (pooled, recent), (want_pooled, want_recent) = self.got, self.want
        assert torch.equal(recent.cpu(), want_recent)
        # Means are summed in another order, which may round one half-precision value differently.
        eps = torch.finfo(self.dtype).eps
        torch.testing.assert_close(pooled.cpu(), want_pooled, rtol=4 * eps, atol=eps)


def test_every_summary_has_a_kernel_for_prompts():
    assert set(PROMPT_SUMMARY_KERNELS) == set(SUMMARY_KERNELS)
    assert set(PROMPT_SUMMARY_KERNELS) == {selector.summary.name for selector in SELECTORS}


@pytest.mark.parametrize("name", ["pooled_keys", "key_bounds"])
@pytest.mark.parametrize("seed", range(6))
def test_ragged_turns_equal_the_summary(device, name, seed):
    size, stride = WINDOWS[seed % len(WINDOWS)]
    keys = Keys(device, name, Geometry(12, 16, size, stride), seed)
    for num_tokens in (1 + seed, 40, 2, 33):
        keys.turn(num_tokens)
        keys.check()


@pytest.mark.parametrize("name", ["pooled_keys", "key_bounds"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "gaps"])
def test_keys_of_any_layout_and_dtype(device, name, layout, dtype):
    keys = Keys(device, name, Geometry(3, 64, 32, 16), 1, dtype)
    for num_tokens in (70, 65):
        keys.turn(num_tokens, layout)
        keys.check()


@pytest.mark.parametrize(("size", "stride"), WINDOWS)
def test_pooled_keys_are_those_of_decode_steps_bit_for_bit(device, size, stride):
    """However a text is cut: windows are summed in one order."""
    geometry = Geometry(6, 16, size, stride)
    k = torch.randn(1, 1, 70, 12, device=device)
    found = []
    for turns in ((70,), (1,) * 70, (7, 1, 1, 33, 2, 26)):
        tensors = [
            torch.zeros(1, 1, *shape, device=device)
            for shape in summary_named("pooled_keys").shapes(geometry, 12).values()
        ]
        length = torch.zeros(1, dtype=torch.int32, device=device)
        for part in k.split(turns, 2):
            if part.shape[2] == 1:
                SUMMARY_KERNELS["pooled_keys"](part, length, tensors, geometry)
            else:
                mask = torch.ones(1, part.shape[2], dtype=torch.bool, device=device)
                tokens = number_tokens(mask, length)
                PROMPT_SUMMARY_KERNELS["pooled_keys"](part, tokens, length, tensors, geometry)
            length += part.shape[2]
        found.append(tensors)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
