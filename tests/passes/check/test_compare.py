"""What an argument takes and what it should take, in words."""

from __future__ import annotations

import pytest

from sparda_compile.graph.nodes import find_ops, snapshot
from sparda_compile.graph.op_index import OpIndex
from sparda_compile.passes.check.compare import compare, wanted_words, words_of


@pytest.fixture
def op(plan_of):
    graph = snapshot(plan_of("llama", mode="query").graph_module).graph
    return OpIndex(graph).ops[find_ops(graph, "sparse_attention")[1]]


def test_what_is_as_expected_is_not_named(op):
    plan = op.args["page_ids"].args[0].name
    assert list(compare(op, {"pages": "sparda_pages_1", "lengths": "sparda_lengths"})) == []
    assert list(compare(op, {"page_ids": (plan, op.args["page_ids"].args[1])})) == []


def test_what_is_not_is_named_with_both(op):
    (wrong,) = compare(op, {"pages": "sparda_pages_0"})
    assert wrong == "sparse_attention_1 takes sparda_pages_1 as its pages, not sparda_pages_0"
    (wrong,) = compare(op, {"page_ids": ("plan_9", 3)})
    assert wrong.endswith("not result 3 of plan_9")
    assert "page_ids_1 (result " in wrong


def test_state_of_others_is_named(op):
    (wrong,) = compare(op, {}, frozenset({"sparda_lengths"}))
    assert wrong == "sparse_attention_1 takes sparda_pages_1, which is of another layer"
    assert list(compare(op, {})) == []


def test_words():
    assert words_of([]) == "[]"
    assert words_of(None) == "None"
    assert wanted_words(["a", ("b", 2), None]) == "[a, result 2 of b, None]"
