from __future__ import annotations

from collections import Counter

import pytest
import torch

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.haystack import Maker


def maker(batch_size=1, length=50, seed=0):
    return Maker(batch_size, length, torch.Generator().manual_seed(seed))


def test_places_are_apart_and_inside():
    starts = maker(500).places(room=20, count=4, width=3)
    assert int(starts.min()) == 1
    assert int(starts.max()) == 20 - 3 + 1
    assert int((starts[:, 1:] - starts[:, :-1]).min()) == 3


def test_places_are_equally_likely():
    # Two runs of two tokens in five: (1,3), (1,4), (2,4).
    starts = maker(3000).places(room=5, count=2, width=2)
    counts = Counter(map(tuple, starts.tolist()))
    assert set(counts) == {(1, 3), (1, 4), (2, 4)}
    assert min(counts.values()) > 900


def test_room_says_what_is_needed():
    assert maker(length=50).room(tail=10, needed=39) == 39
    with pytest.raises(ConfigError, match="use 51 or more"):
        maker(length=50).room(tail=10, needed=40)


def test_distinct_draws_differ():
    drawn = maker(20).distinct(10, 12)
    assert all(len(set(row)) == 10 for row in drawn.tolist())
    assert int(drawn.max()) == 11


def test_noise_begins_every_sequence():
    ids = maker(4, length=40).noise()
    assert ids.shape == (4, 40)
    assert ids[:, 0].tolist() == [1] * 4
    assert torch.equal(ids[:, 1:24], ids[:, 17:40])
