from __future__ import annotations

import itertools

import pytest
import torch

from sparda_compile.errors import ConfigError
from sparda_compile.training.packing import held_out_documents, packed_batches


def documents(count, size=50):
    """Return documents of numbers that say where each token was."""
    return [torch.arange(size * n, size * n + size) for n in range(1, count + 1)]


def test_a_share_of_the_documents_is_held_out_by_a_seed():
    chosen = held_out_documents(40, 0.1, 3)
    assert len(set(chosen)) == 4
    assert chosen == sorted(chosen) == held_out_documents(40, 0.1, 3)
    assert chosen != held_out_documents(40, 0.1, 4)
    assert len(held_out_documents(5, 0.01, 0)) == 1
    assert held_out_documents(5, 0.0, 0) == []


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none(share):
    with pytest.raises(ConfigError, match="is no share of documents"):
        held_out_documents(5, share, 0)


def test_no_document_would_be_left():
    with pytest.raises(ConfigError, match="of 1 documents leaves none to learn from"):
        held_out_documents(1, 0.2, 0)


def test_every_sequence_is_a_run_of_the_documents_and_every_token_comes_once():
    batches = packed_batches(documents(9), [7], length=20, batch_size=3, seed=1)
    assert {tuple(batch.shape) for batch in batches} == {(3, 20)}
    assert len(batches) == 9 * 51 // 60
    tokens = torch.cat(batches).flatten().tolist()
    kept = [token for token in tokens if token != 7]
    assert len(kept) == len(set(kept))
    rows = [row for batch in batches for row in batch.tolist()]
    for row in rows:
        for here, after in itertools.pairwise(row):
            assert after in (here + 1, 7) or here == 7
    assert rows != sorted(rows)


def test_the_seed_decides():
    one, same, other = (
        packed_batches(documents(9), [], length=20, batch_size=2, seed=seed) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("texts", [[], documents(1)])
def test_too_few_tokens(texts):
    with pytest.raises(ConfigError, match="needs 80; pass more documents"):
        packed_batches(texts, [], length=40, batch_size=2, seed=0)
