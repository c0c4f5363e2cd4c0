"""How much there is in a union."""

from __future__ import annotations

import pytest

from sparda_compile.kernels.union_sizes import (
    mark_words,
    union_entries,
    union_words,
    unions_bytes,
)


def test_a_union_has_no_more_blocks_than_there_are_nor_than_its_tokens_read():
    assert union_entries(300, 8, 20) == 160
    assert union_entries(100, 8, 20) == 100


@pytest.mark.parametrize(("tokens", "words"), [(1, 1), (32, 1), (33, 2), (64, 2), (128, 4)])
def test_a_token_has_a_bit_in_a_power_of_two_of_words(tokens, words):
    assert union_words(tokens) == words


@pytest.mark.parametrize(("tokens", "words"), [(1, 10), (8, 75), (32, 300), (64, 600)])
def test_a_word_has_the_marks_of_several_blocks_where_tokens_are_few(tokens, words):
    assert mark_words(300, tokens) == words


def test_a_union_takes_an_id_a_slot_and_readers_for_each_block_beside_its_marks():
    assert unions_bytes(300, 8, 20) == 160 * (4 + 4 + 4) + 4 * 75 + 4
    assert unions_bytes(300, 64, 20) == 300 * (4 + 4 + 8) + 4 * 600 + 4
