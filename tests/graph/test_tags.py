"""Tags: what stands in `meta`, by one name each."""

from __future__ import annotations

import pytest
from torch import fx

from sparda_compile.graph import tags
from sparda_compile.graph.tags import LAYER, Tag


def test_a_tag_is_put_read_and_dropped():
    node = fx.Graph().placeholder("x")
    assert not LAYER.on(node)
    assert LAYER.get(node) is None
    assert LAYER.get(node, -1) == -1
    with pytest.raises(KeyError):
        LAYER.of(node)
    LAYER.put(node, 3)
    assert LAYER.on(node)
    assert (LAYER.of(node), LAYER.get(node, -1), node.meta) == (3, 3, {"sparda_layer": 3})
    LAYER.drop(node)
    LAYER.drop(node)
    assert node.meta == {}


def test_no_two_tags_share_a_key():
    all_tags = [value for value in vars(tags).values() if isinstance(value, Tag)]
    assert len({tag.key for tag in all_tags}) == len(all_tags) == 7
