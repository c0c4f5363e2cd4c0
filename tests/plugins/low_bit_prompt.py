"""New tokens of a prompt, and low-bit keys: what kernels and the reference pick of them."""

from __future__ import annotations

import math
from unittest import mock

import torch
from picked import check_picks

from sparda_compile.kernels.gpu import select_tokens as kernels
from sparda_compile.kernels.prefill_attention import token_positions
from sparda_compile.kernels.select_tokens import select_tokens
from sparda_compile.selectors import SELECTORS
from sparda_compile.selectors.base import empty_summary

SCALE = 0.3


class Prompt:
    """New tokens behind `lengths` others, some of them hidden, and the low-bit keys of all."""

    def __init__(self, selector, lengths, mask, sizes, geometry, *, dtype=torch.float32):
        groups, repeat, dim = sizes
        self.generator = torch.Generator().manual_seed(0)
        self.rule, self.geometry, self.dtype = SELECTORS[selector], geometry, dtype
        self.mask = torch.tensor(mask)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.totals = self.lengths + self.mask.sum(1)
        batch, num_tokens = self.mask.shape
        heads = groups * (1 if selector.endswith("forecast") else repeat)
        self.query = self.numbers(batch, num_tokens, heads, dim).transpose(1, 2)
        self.k = self.numbers(batch, groups, int(self.totals.max()), dim)
        self.position = token_positions(self.lengths, self.mask, num_tokens).int()

    def numbers(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def summary(self, counts=None):
        """Return that of so many keys of each sequence; what is in no full block is NaN."""
        counts = self.totals if counts is None else counts
        tensors = empty_summary(self.rule.summary, self.k, self.geometry)
        mask = torch.arange(self.k.shape[2]) < counts[:, None]
        none = torch.zeros_like(self.lengths)
        self.rule.summary.extend(tensors, self.k, none, mask, self.geometry)
        for row, count in enumerate(counts.tolist()):
            full = count // self.geometry.block_size
            tensors[0][row, :, full:] = 0x5A
            for tensor in tensors[1:3]:
                tensor[row, :, full:] = math.nan
        return tensors

    def asked(self, device, summary=None):
        """Return what kernels are asked."""
        tensors = self.summary() if summary is None else summary
        return kernels.Asked(
            self.query.to(device), [tensor.to(device) for tensor in tensors],
            self.position.to(device), self.lengths.to(device), int(self.lengths.max()),
            self.rule.name, SCALE, self.geometry,
        )  # fmt: skip

    def wanted(self, choice, device, num_candidates=0):
        """Return what the reference picks, where it runs as it stands."""
        # It hides what it reads of blocks that are not full, and knows no NaN.
        exact = [tensor.nan_to_num() if tensor.is_floating_point() else tensor
                 for tensor in self.summary()]  # fmt: skip
        it, sizes = self.asked(device, exact), self.geometry
        with mock.patch.object(kernels, "covers", return_value=False):
            return select_tokens(
                it.query, it.tensors, it.positions, it.lengths, it.num_past, it.selector, SCALE,
                sizes.num_blocks, sizes.block_size, sizes.pool_size, sizes.pool_stride,
                choice.num_selected, choice.sink_blocks, choice.local_blocks,
                num_candidates=num_candidates,
            ).cpu()  # fmt: skip

    def check(self, device, choice, least_equal=1.0, reference="cpu", num_candidates=0):
        """Compare with the reference; return the ids."""
        it, want = self.asked(device), self.wanted(choice, reference, num_candidates)
        assert kernels.covers(it.selector, it.query, it.num_groups, self.geometry)
        got = torch.empty_like(want, device=device)
        kernels.select_tokens(it, choice, got, num_candidates)
        self.check_in_two_parts(device, choice, got)
        got = got.cpu()
        check_picks(got, want, self.mask, least_equal)
        return got

    def check_in_two_parts(self, device, choice, want):
        """What a Forecast picks of the past first, by its own keys, changes no bit."""
        if not self.rule.settles or choice.local_blocks < 1:
            return
        past = self.asked(device, self.summary(self.lengths))
        near, ids = torch.empty_like(want), torch.empty_like(want)
        known = torch.empty(want.shape, device=want.device)
        kernels.select_past(past, choice, near, known)
        kernels.select_near(self.asked(device), choice, (near, known), ids)
        assert torch.equal(ids, want)
