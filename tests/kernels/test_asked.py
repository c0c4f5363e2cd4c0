from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile.kernels.asked import Asked
from sparda_compile.selectors import SELECTORS, Geometry

GEOMETRY = Geometry(12, 16, 8, 4)


def asked(selector):
    none = torch.zeros(1, dtype=torch.int32)
    query, pooled = torch.zeros(1, 6, 3, 8), torch.zeros(1, 2, GEOMETRY.num_windows, 8)
    return Asked(query, [pooled], none[None], none, 0, selector, 1.0, GEOMETRY)


@pytest.mark.parametrize("selector", [selector.name for selector in SELECTORS])
def test_what_a_selector_asks_for(selector):
    it = asked(selector)
    assert it.num_groups == 2
    assert it.softmax == (selector in ("infllm2", "nosa", "lowbit2", "lowbit4"))
    assert it.lists == SELECTORS[selector].has_short_list
    assert it.is_low_bit == SELECTORS[selector].scores_tokens
    of_blocks = selector == "quest" or it.is_low_bit
    assert 16 // it.windows.pool_stride == (1 if of_blocks else 4)
    # A bound is of any block that has a token, low-bit keys are of full ones.
    assert it.windows.pool_size == (16 if it.is_low_bit else 1 if of_blocks else 8)


def test_a_look_asks_with_the_mean_of_each_group():
    it = dataclasses.replace(asked("lowbit2"), query=torch.randn(1, 6, 3, 8).bfloat16())
    look = it.look("lowbit2_forecast")
    assert (look.selector, look.softmax) == ("lowbit2_forecast", False)
    want = torch.stack([it.query[0, :3].float().mean(0), it.query[0, 3:].float().mean(0)])
    assert torch.equal(look.query[0], want.bfloat16())


def test_tokens_are_told_apart_by_the_blocks_before_theirs():
    positions = torch.tensor([[-1, 0, 95, 96, 150]], dtype=torch.int32)
    it = dataclasses.replace(asked("lowbit2"), positions=positions, num_past=90)
    few, many = it.apart(6)
    assert few.positions.tolist() == [[-1, 0, 95, -1, -1]]
    assert many.positions.tolist() == [[-1, -1, -1, 96, 150]]
    assert [each.blocks_of(5) for each in (few, many, it)] == [6, 6, 6]
    assert [each.blocks_of(70) for each in (few, many)] == [6, 10]
    assert it.blocks_of(1000) == 12  # as many as there is room for
