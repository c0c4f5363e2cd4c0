from __future__ import annotations

from collections import Counter

import pytest
import torch

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.counting import common_words, frequent_words
from sparda_compile.evaluation.haystack import Maker


def maker(length):
    return Maker(3, length, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [100, 3000])
def test_common_words_are_a_tenth_each(length):
    batch = common_words(maker(length))
    for row, answers in zip(batch.ids_BT.tolist(), batch.answers_BA.tolist(), strict=True):
        counts = Counter(row[1 : batch.question_start])
        wanted = int((length - 6) * 0.1)
        assert [counts.pop(word) for word in answers] == [wanted] * 4
        assert max(counts.values()) * 2 < wanted
    assert not batch.copies


@pytest.mark.parametrize("length", [120, 3000])
def test_frequencies_fall_with_the_square_of_the_rank(length):
    batch = frequent_words(maker(length))
    for row, answers in zip(batch.ids_BT.tolist(), batch.answers_BA.tolist(), strict=True):
        counts = Counter(row[1 : batch.question_start])
        first, second, third = (counts[word] for word in answers)
        assert first > 3 * second > 3 * third
        assert sum(counts.values()) == length - 5


def test_length_at_which_ranks_are_equal():
    with pytest.raises(ConfigError, match="too small"):
        frequent_words(maker(12))
