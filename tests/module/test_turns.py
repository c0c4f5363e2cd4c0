from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparda_compile.errors import KVCacheError
from sparda_compile.module.turns import check_owner, check_reserved, check_second_turn


def test_only_caches_of_this_library_are_taken():
    with pytest.raises(KVCacheError, match="the cache given is a dict; pass None"):
        check_owner(None, {})


@pytest.mark.parametrize(("limit", "total"), [(None, 10**6), (8, 8), (8, 1)])
def test_what_fits_passes(limit, total):
    check_reserved(limit, total)


def test_more_than_is_reserved_is_refused():
    with pytest.raises(KVCacheError, match="need 9 tokens per sequence, more than max_tokens=8"):
        check_reserved(8, 9)


@pytest.mark.parametrize("tokens", [2, 3])
def test_a_second_turn_passes_the_whole_text(tokens):
    held = SimpleNamespace(get_seq_length=lambda: 3, check_ids=lambda ids: None)
    with pytest.raises(KVCacheError, match=f"input_ids has {tokens} tokens but the cache holds 3"):
        check_second_turn(held, torch.zeros(1, tokens), None, 9)


def test_a_second_turn_begins_with_what_is_held():
    seen = []
    held = SimpleNamespace(get_seq_length=lambda: 3, check_ids=seen.append)
    ids = torch.zeros(1, 5)
    check_second_turn(held, ids, 9, 9)
    assert seen[0] is ids
    check_second_turn(SimpleNamespace(get_seq_length=lambda: 0), None, 9, 9)
