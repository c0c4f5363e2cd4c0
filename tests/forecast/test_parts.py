from __future__ import annotations

import pytest
import torch

from sparda_compile.forecast.parts import parts_of
from sparda_compile.forecast.projection import Projection, ProjectionShape
from sparda_compile.ranks.agreement import ALONE, Ranks

W = torch.arange(48.0).view(8, 6)


@pytest.mark.parametrize(("rank", "rows"), [(0, [0, 1, 2, 3]), (1, [4, 5, 6, 7])])
def test_a_rank_gets_the_rows_of_its_heads(rank, rows):
    found = parts_of({3: Projection((W,))}, {3: ProjectionShape(4, 6)}, Ranks(2, rank, "pair"))
    assert torch.equal(found[3].factors[0], W[rows])
    assert found[3].factors[0].untyped_storage().nbytes() == 4 * 6 * 4, "not all of the file stays"


def test_of_two_factors_the_first_is_cut():
    u, v = torch.randn(8, 2), torch.randn(2, 6)
    found = parts_of({0: Projection((u, v))}, {0: ProjectionShape(2, 6, 2)}, Ranks(4, 3, "four"))
    assert torch.equal(found[0].factors[0], u[6:])
    assert torch.equal(found[0].factors[1], v)


def test_two_factors_are_multiplied_where_one_matrix_is_smaller():
    u, v = torch.randn(8, 2), torch.randn(2, 6)
    found = parts_of({0: Projection((u, v))}, {0: ProjectionShape(2, 6)}, Ranks(4, 1, "four"))
    torch.testing.assert_close(found[0].factors[0], (u @ v)[2:4])


def test_what_has_other_rows_is_left_to_its_check():
    given = {0: Projection((W,))}
    assert parts_of(given, {0: ProjectionShape(3, 6)}, Ranks(2, 0, "pair"))[0] is given[0]
    assert parts_of(given, {0: ProjectionShape(8, 6), 1: ProjectionShape(8, 6)}, ALONE).keys() == {
        0
    }
