"""Positions, columns and totals of a prompt's tokens."""

from __future__ import annotations

import torch

from sparda_compile.kernels.number_tokens import number_tokens


def test_tokens_are_numbered_behind_those_of_the_cache():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    lengths = torch.tensor([5, 0, 7, 2], dtype=torch.int32)
    positions, columns, totals = number_tokens(mask, lengths)
    assert positions.tolist() == [[-1, 5, 6, -1], [0, -1, -1, 1], [-1] * 4, [2, 3, 4, 5]]
    assert totals.tolist() == [7, 2, 7, 6]
    assert [row[:2] for row in columns.tolist()[:2]] == [[1, 2], [0, 3]]
    assert columns.tolist()[3] == [0, 1, 2, 3]
    assert torch.equal(columns.sort(1).values, torch.arange(4).expand(4, -1).int())
    assert {t.dtype for t in (positions, columns, totals)} == {torch.int32}
    assert lengths.tolist() == [5, 0, 7, 2]
