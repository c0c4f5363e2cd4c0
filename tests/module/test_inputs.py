from __future__ import annotations

import pytest
import torch

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.module.inputs import check_holes, check_kept_tokens, check_reach


def test_holes_are_refused_where_a_window_would_count_them() -> None:
    holes = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    around = torch.tensor([[0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    with pytest.raises(UnsupportedInputError, match="sliding window of 4 tokens"):
        check_holes(holes, (0, 8, 4))
    for mask, windows in ((holes, (0, 0)), (holes, (6,)), (around, (4,)), (None, (4,))):
        check_holes(mask, windows)


def test_no_text_is_longer_than_it_may_reach() -> None:
    check_reach(64, 64)
    check_reach(1 << 20, 0)
    with pytest.raises(
        UnsupportedInputError, match=r"65 tokens .* sliding window of 64, which holds"
    ):
        check_reach(65, 64)


@pytest.mark.parametrize(("index", "shown"), [(7, 7), (-8, -8), (99, 99)])
def test_logits_of_tokens_that_are_not_passed_in_are_refused(index: int, shown: int) -> None:
    for kept in (0, 99, torch.tensor([0, -7, 6]), torch.tensor([], dtype=torch.long)):
        check_kept_tokens(kept, 7)
    with pytest.raises(UnsupportedInputError, match=f"holds {shown}, .* use indices of -7 to 6"):
        check_kept_tokens(torch.tensor([0, index]), 7)
