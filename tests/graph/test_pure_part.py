"""A part of a program is the same wherever it stands, and another where it computes another."""

from __future__ import annotations

import pytest
import torch
from hand_written import Written
from torch._subclasses.fake_tensor import FakeTensorMode

from sparda_compile.errors import PassError
from sparda_compile.graph.nodes import call_name
from sparda_compile.graph.pure_part import cut_out, form_of
from sparda_compile.sizes import BATCH_SIZE, NUM_TOKENS, SAMPLES


def shifted(names=("x", "shift"), rows=3):
    """Return (x * 2 + shift).sum(-1) as a part."""
    written = Written()
    x, shift = (written.input(name, rows, 4) for name in names)
    doubled = written.method("mul", x, 2)
    moved = written.method("add", doubled, shift)
    total = written.method("sum", moved, -1)
    return cut_out([doubled, moved, total], [total])


def test_a_part_takes_what_it_uses_and_returns_what_is_asked_for():
    part = shifted()
    assert [node.name for node in part.inputs] == ["x", "shift"]
    assert [call_name(node) for node in part.outputs] == ["sum"]
    assert part.sizes == ()
    x, shift = torch.randn(3, 4), torch.randn(3, 4)
    (got,) = part.graph_module(x, shift)
    torch.testing.assert_close(got, (x * 2 + shift).sum(-1))


def test_parts_of_one_key_share_a_graph():
    one, other = shifted(), shifted(("weight_of_layer_7", "y"))
    assert one.key == other.key
    assert one.graph_module is other.graph_module
    assert one.inputs != other.inputs
    assert shifted(rows=5).key != one.key


def test_open_sizes_are_arguments():
    written = Written()
    batch = written.size(BATCH_SIZE, SAMPLES.batch)
    x = written.input("x", SAMPLES.batch * 4)
    rows = written.method("view", x, batch, 4)
    part = cut_out([rows], [rows])
    assert part.sizes == (BATCH_SIZE,)
    (got,) = part.graph_module(3, torch.arange(12.0))
    assert torch.equal(got, torch.arange(12.0).view(3, 4))


def test_form_names_open_sizes():
    with FakeTensorMode():
        value = torch.empty(SAMPLES.batch, SAMPLES.tokens, 8, dtype=torch.bfloat16)
    assert form_of(value) == "torch.bfloat16 cpu ['B', 'T', '8'] ['T*8', '8', '1']"


def test_a_number_in_the_place_of_an_open_size_is_refused():
    written = Written()
    written.size(NUM_TOKENS, SAMPLES.tokens)
    x = written.input("x", SAMPLES.tokens * 4)
    rows = written.method("view", x, SAMPLES.tokens, 4)
    with pytest.raises(PassError, match="524309 stands for T in the graph"):
        cut_out([rows], [rows])


def test_what_others_have_made_is_not_changed():
    written = Written()
    changed = written.method("add_", written.input("x", 2), 1)
    with pytest.raises(PassError, match="changes a tensor in place"):
        cut_out([changed], [changed])
