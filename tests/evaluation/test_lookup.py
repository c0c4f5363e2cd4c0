from __future__ import annotations

import torch

from sparda_compile.evaluation.haystack import Maker
from sparda_compile.evaluation.lookup import lookup, multi_value, variable_tracking
from sparda_compile.evaluation.vocabulary import LINK, RECORD


def maker(batch_size=64, length=200):
    return Maker(batch_size, length, torch.Generator().manual_seed(0))


def test_all_records_are_there():
    batch = lookup(maker(), num_records=9, num_queries=2)
    assert (batch.ids_BT[:, : batch.question_start] == RECORD).sum(1).tolist() == [9] * 64


def test_no_more_questions_than_records():
    batch = lookup(maker(), num_records=3, num_queries=8)
    assert batch.question_start == 200 - 9


def test_records_fill_what_there_is():
    batch = lookup(maker(8, length=1 + 3 * 20 + 3), num_records=20, num_queries=1)
    assert (batch.ids_BT == RECORD).sum(1).tolist() == [20] * 8


def test_values_of_one_key_differ():
    batch = multi_value(maker())
    assert batch.any_order
    assert all(len(set(row)) == 4 for row in batch.answers_BA.tolist())


def test_chains_are_mixed():
    batch = variable_tracking(maker())
    links = batch.ids_BT == LINK
    assert links.sum(1).tolist() == [8] * 64
    # Which of the eight links belong to the asked chain differs between sequences.
    rank = links.cumsum(1).gather(1, batch.evidence_BA)
    assert len({tuple(row) for row in rank.tolist()}) > 20
