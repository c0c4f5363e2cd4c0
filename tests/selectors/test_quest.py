from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparda_compile.selectors.base import Geometry
from sparda_compile.selectors.quest import KeyBounds, Quest

GEOMETRY = Geometry(5, 16, 8, 4)


def empty(rows=1, groups=2, dim=3, dtype=torch.float32):
    ((_, shape),) = KeyBounds().shapes(GEOMETRY, dim).items()
    tensors = [torch.full((rows, groups, *shape), float("nan"), dtype=dtype)]
    KeyBounds().reset(tensors)
    return tensors


@given(chunks=st.lists(st.integers(0, 40), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_any_chunks_give_the_bounds_of_all_keys(chunks, seed):
    """A chunk of 0 is one token in the decode form; others come with padding."""
    generator = torch.Generator().manual_seed(seed)
    tensors = empty(rows=2)
    seen = [torch.zeros(2, 0, 3), torch.zeros(2, 0, 3)]
    for chunk in chunks:
        num_tokens = min(chunk or 1, 80 - max(k.shape[1] for k in seen))
        if not num_tokens:
            break
        lengths = torch.tensor([k.shape[1] for k in seen], dtype=torch.int32)
        k_BGTD = torch.randn(2, 2, num_tokens, 3, generator=generator)
        mask = None if chunk == 0 else torch.rand(2, num_tokens, generator=generator) < 0.7
        KeyBounds().extend(tensors, k_BGTD, lengths, mask, GEOMETRY)
        for row in range(2):
            new = k_BGTD[row] if mask is None else k_BGTD[row][:, mask[row]]
            seen[row] = torch.cat([seen[row], new], dim=1)
    for row, keys in enumerate(seen):
        for m in range(5):
            block = keys[:, 16 * m : 16 * (m + 1)]
            low, high = tensors[0][row, :, m].unbind(1)
            if block.shape[1]:
                assert torch.equal(low, block.amin(1))
                assert torch.equal(high, block.amax(1))
            else:
                assert low.eq(math.inf).all()
                assert high.eq(-math.inf).all()


@pytest.mark.parametrize("length", [0, 1, 16, 17, 80])
@pytest.mark.parametrize("repeat", [1, 3, 7])
def test_scores_follow_the_formula_and_bound_every_key(length, repeat):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2 * repeat, 1, 60, generator=generator)
    keys = torch.randn(1, 2, length, 60, generator=generator)
    tensors = empty(dim=60)
    mask = torch.ones(1, length, dtype=torch.bool)
    if length:
        KeyBounds().extend(tensors, keys, torch.zeros(1, dtype=torch.int32), mask, GEOMETRY)
    got = Quest().score(query, tensors, torch.tensor([length]), 9.0, GEOMETRY)
    for group in range(2):
        mean = query[0, group * repeat : (group + 1) * repeat, 0].double().mean(0)
        for m in range(5):
            block = keys[0, group, 16 * m : 16 * (m + 1)].double()
            if not len(block):
                assert got[0, group, m] == -math.inf
                continue
            corners = torch.stack([mean * block.amin(0), mean * block.amax(0)])
            assert got[0, group, m].item() == pytest.approx(corners.amax(0).sum().item(), rel=1e-4)
            assert got[0, group, m].item() > (block @ mean).max().item() - 1e-3


def test_bounds_keep_half_precision_keys_as_they_are():
    keys = torch.randn(1, 2, 1, 3).to(torch.bfloat16)
    tensors = empty(dtype=torch.bfloat16)
    KeyBounds().extend(tensors, keys, torch.tensor([33]), None, GEOMETRY)
    assert torch.equal(tensors[0][0, :, 2, 0], keys[0, :, 0])
    assert torch.equal(tensors[0][0, :, 2, 1], keys[0, :, 0])
