"""A side piece writes what its part returned, and is found by its name."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sparda_compile.errors import PassError
from sparda_compile.graph.emit import propagate
from sparda_compile.graph.nodes import call_name, fake_value
from sparda_compile.graph.pure_part import cut_out
from sparda_compile.graph.side_piece import add_side_piece, side_piece


def part(factor=2, dtype=torch.float32):
    """Return x.mul(factor).transpose(0, 1) as a part."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode():
        x.meta["val"] = torch.empty(3, 4, dtype=dtype)
    scaled = graph.call_method("mul", (x, factor))
    scaled.meta["val"] = propagate(scaled)
    turned = graph.call_method("transpose", (scaled, 0, 1))
    turned.meta["val"] = propagate(turned)
    return cut_out([scaled, turned], [turned])


def test_it_writes_its_last_argument_and_returns_nothing():
    made = add_side_piece(part())
    x, result = torch.randn(3, 4), torch.full((4, 3), float("nan"))
    assert made.graph_module(x, result) == ()
    assert torch.equal(result, (x * 2).T)
    assert (made.sizes, made.dtype) == ((), torch.float32)


def test_the_part_is_left_as_it_was():
    before = part()
    names = [node.name for node in before.graph_module.graph.nodes]
    add_side_piece(before)
    assert [node.name for node in before.graph_module.graph.nodes] == names
    (got,) = before.graph_module(torch.ones(3, 4))
    assert torch.equal(got, torch.full((4, 3), 2.0))


def test_equal_parts_are_one_piece_and_others_are_not():
    made = add_side_piece(part())
    assert add_side_piece(part()) is made
    assert side_piece(made.name) is made
    assert made.key != part().key
    others = [add_side_piece(part(3)), add_side_piece(part(dtype=torch.bfloat16))]
    assert len({made.name, *(other.name for other in others)}) == 3
    assert others[1].dtype == torch.bfloat16


def test_every_node_has_a_fake_value_for_the_cost_model():
    for node in add_side_piece(part()).graph_module.graph.nodes:
        assert fake_value(node) is not None, call_name(node)


def test_the_write_is_not_taken_for_dead_code():
    graph = add_side_piece(part()).graph_module.graph
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    assert not copied.eliminate_dead_code()


def test_an_unknown_name_is_refused():
    with pytest.raises(PassError, match="'piece_0' names no piece of this process"):
        side_piece("piece_0")
