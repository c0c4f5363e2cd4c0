from __future__ import annotations

import torch

from sparda_compile.memory import Eviction
from sparda_compile.runtime.eviction import TOUCHES_HITS, victim_order


def order(stamps, selected, now=10):
    chosen = torch.tensor([[[page in selected for page in range(len(stamps))]]])
    now_B = torch.tensor([now], dtype=torch.int32)
    return victim_order(torch.tensor([[stamps]], dtype=torch.int32), chosen, now_B)[0, 0].tolist()


def test_free_pages_go_first_then_the_oldest_then_the_lower_page():
    assert order([7, -1, 3, 3, -1, 9], ()) == [1, 4, 2, 3, 0, 5]


def test_selected_pages_come_last():
    assert order([7, -1, 3, 3, -1, 9], (2, 1)) == [4, 3, 0, 5, 1, 2]


def test_stamps_of_more_than_254_steps_ago_are_equally_old():
    assert order([50, 45, 46, -1], (), now=300) == [3, 1, 2, 0]
    assert order([50, 44, 43, -1], (), now=300) == [3, 1, 2, 0]


def test_rows_and_groups_are_apart():
    stamps = torch.tensor([[[2, 1], [1, 2]], [[0, 0], [5, -1]]], dtype=torch.int32)
    now_B = torch.tensor([9, 9], dtype=torch.int32)
    got = victim_order(stamps, torch.zeros(2, 2, 2, dtype=torch.bool), now_B)
    assert got.tolist() == [[[1, 0], [0, 1]], [[0, 1], [1, 0]]]


def test_every_policy_of_the_configuration_is_there():
    assert set(TOUCHES_HITS) == set(Eviction.__args__)
    assert TOUCHES_HITS == {"lru": True, "fifo": False}
