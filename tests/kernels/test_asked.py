from __future__ import annotations

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
