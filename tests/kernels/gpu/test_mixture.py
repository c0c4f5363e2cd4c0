"""Kernels of mixed scores against their references: rounding apart, at any number of blocks."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.kernels.gpu import mixture as room
from sparda_compile.kernels.mixture import DECAY, START, learn_reference, mix_reference
from sparda_compile.kernels.predict_blocks import calibrated_or, standardise
from sparda_compile.selectors.nosa import LISTED

INF = float("inf")
SIZE = 16


def made(num_blocks, seed=0, listed=False):
    """Return own and early scores, level, trend, lengths and sums; some blocks have no score."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, num_blocks)
    parts = [torch.randn(shape, generator=generator) for _ in range(4)]
    for part in parts[:3]:
        part[torch.rand(shape, generator=generator) < 0.2] = -INF
    if listed:
        parts[1][..., num_blocks // 2] = LISTED
    lengths = torch.randint(0, num_blocks * SIZE, (2,), generator=generator).int()
    sums = torch.rand((2, 3, 2), generator=generator)
    sums[0, 0] = 0.0  # nothing learned
    sums[1, 1, 0] = -1.0
    return (*parts, lengths, sums)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("comparable", [False, True])
@pytest.mark.parametrize("num_blocks", [1, 37, 64, 1500])
def test_kernels_are_the_references(device, num_blocks, comparable, calibrated):
    own, asked, level, trend, lengths, sums = made(num_blocks, num_blocks, listed=not comparable)
    weights = torch.tensor([[0.4, 0.3, 0.75], [0.0, 0.0, 0.0]]) if calibrated else None
    past = level + calibrated_or((0.0, 0.0, 0.25), weights)[2] * trend
    early, right = (x if comparable else standardise(x) for x in (asked, own))
    want = mix_reference(early, past, sums)
    got = torch.full_like(want, float("nan")).to(device)
    moved = [x.to(device) for x in (own, asked, level, trend, lengths, sums)]
    given = (moved[2], moved[3], 0.25, None if weights is None else weights.to(device))
    room.mix(moved[1], given, moved[5], got, START, are_comparable=comparable)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    learn_reference(right, early, past, lengths, sums, (SIZE, 1, 2))
    operands = (moved[0], moved[1], given, moved[4], moved[5], (SIZE, 1, 2))
    room.learn(*operands, DECAY, are_comparable=comparable)
    torch.testing.assert_close(moved[5].cpu(), sums, rtol=1e-5, atol=1e-4)


def test_more_blocks_than_a_program_holds_are_refused(device):
    asked = torch.zeros(1, 1, 40000, device=device)
    sums = torch.zeros(1, 1, 2, device=device)
    with pytest.raises(UnsupportedInputError, match="32768"):
        room.mix(asked, (asked, asked, 0.0, None), sums, asked.clone(), START, are_comparable=True)
