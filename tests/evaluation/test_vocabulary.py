from __future__ import annotations

import pytest
import torch

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation import vocabulary


def test_spelling_is_one_to_one():
    tokens = torch.arange(vocabulary.NUM_TOKENS)
    spelled = vocabulary.to_bytes(tokens)
    assert spelled.shape == (5 * vocabulary.NUM_TOKENS,)
    assert int(spelled.max()) < 128
    assert vocabulary.from_bytes(spelled.tolist()) == tokens.tolist()


def test_spelling_of_each_kind():
    spelled = [vocabulary.spell(token) for token in (2, 9, 16, 64, 1088, 1599)]
    assert spelled == ["note", "<09>", ".00.", "baba", "1000", "1511"]


def test_ranges_follow_each_other():
    assert vocabulary.FREQUENT < vocabulary.FIRST_NOISE < vocabulary.FIRST_KEY
    assert vocabulary.FIRST_VALUE + vocabulary.NUM_VALUES == vocabulary.NUM_TOKENS


def test_leading_dimensions_stay():
    ids = torch.tensor([[64, 65], [66, 67]])
    assert vocabulary.to_bytes(ids).shape == (2, 10)


@pytest.mark.parametrize("token", [-1, 1600])
def test_no_such_token(token):
    with pytest.raises(ConfigError, match="0 to 1599"):
        vocabulary.spell(token)


@pytest.mark.parametrize("text", [b"zzzz ", b"bab"])
def test_bytes_that_spell_nothing(text):
    with pytest.raises(ConfigError, match="four characters and a space"):
        vocabulary.from_bytes(text)
