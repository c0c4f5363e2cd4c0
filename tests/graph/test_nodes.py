"""Helpers on nodes, and the emitter."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.nodes import (
    call_name,
    copy_graph,
    find_ops,
    is_sparda,
    module_path,
    nodes_between,
    program_order,
    replace_and_erase,
    tensor_shape,
)
from sparda_compile.ops import OPS


@pytest.fixture
def graph():
    """x -> relu -> a = relu + 1, b = relu * 2 -> out = a + b, with fake values."""
    graph = fx.Graph()
    mode = FakeTensorMode()
    x = graph.placeholder("x")
    with mode:
        x.meta["val"] = torch.empty(2, 3)
    emit = Emitter(graph, graph.output(None), x, 0)
    relu = emit.method("relu", x)
    a = emit.function(torch.add, (relu, 1), {}, "a")
    b = emit.function(torch.mul, (relu, 2), {}, "b")
    out = emit.function(operator.add, (a, b), {}, "out")
    emit.before.args = (out,)
    return graph


def named(graph, *names):
    by_name = {n.name: n for n in graph.nodes}
    return [by_name[name] for name in names]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (torch.relu, "relu"),
        (torch.nn.functional.linear, "linear"),
        (operator.getitem, "getitem"),
        (torch.ops.aten.mm.default, "mm"),
        (torch.ops.aten.mm, "aten.mm"),
        (torch.ops.sparda.select_blocks.default, "sparda.select_blocks"),
    ],
)
def test_name_of_a_call(target, expected):
    node = fx.Graph().call_function(target)
    assert call_name(node) == expected
    assert is_sparda(node) is expected.startswith("sparda.")


def test_name_of_a_method():
    graph = fx.Graph()
    node = graph.call_method("view", (graph.placeholder("x"), 3))
    assert call_name(node) == "view"
    assert not is_sparda(node)


def test_ops_are_found_in_program_order():
    graph = fx.Graph()
    ops = torch.ops.sparda
    first = graph.call_function(ops.wait_blocks.default)
    graph.call_function(torch.relu)
    second = graph.call_function(ops.append_kv.default)
    third = graph.call_function(ops.wait_blocks.default)
    assert find_ops(graph, "wait_blocks") == [first, third]
    assert find_ops(graph, "append_kv", "wait_blocks") == [first, second, third]
    assert find_ops(graph, "plan_pages") == []
    assert set(OPS) >= {"wait_blocks", "append_kv", "plan_pages"}


def test_program_order(graph):
    order = program_order(graph)
    assert [n.name for n in sorted(order, key=order.get)] == [
        "x",
        "relu",
        "a",
        "b",
        "out",
        "output",
    ]


def test_nodes_between(graph):
    x, relu, a, b, out = named(graph, "x", "relu", "a", "b", "out")
    assert nodes_between(x, out) == {relu, a, b, out}
    assert nodes_between(a, out) == {out}
    assert nodes_between(a, b) == set()
    assert nodes_between(out, x) == set()


def test_shape_of_what_is_no_tensor(graph):
    (a, out) = named(graph, "a", "out")
    pair = Emitter(graph, out, a, 0).function(torch.topk, (a, 1), {}, "pair")
    assert tensor_shape(pair) == ()
    assert tensor_shape(a) == (2, 3)


def test_module_path(plan_of):
    graph = plan_of("llama", mode="query").stage("capture").graph
    paths = {module_path(n) for n in graph.nodes if call_name(n) == "linear"}
    assert "lm_head" in paths
    assert {f"model.layers.{i}.self_attn.q_proj" for i in range(2)} <= paths
    assert module_path(fx.Graph().create_node("call_function", len)) == ""


def test_a_copy_has_the_same_nodes_and_shares_none(graph):
    by_hand = graph.placeholder("a")  # gets another name, as this one is taken
    by_hand.name = "_odd_9"
    copy = copy_graph(graph)
    copy.lint()
    assert str(copy) == str(graph)
    for old, new in zip(graph.nodes, copy.nodes, strict=True):
        assert new is not old
        assert (new.name, new.op, new.target, new.type) == (old.name, old.op, old.target, old.type)
        assert new.meta == old.meta
        assert new.meta is not old.meta
        assert [n.name for n in new.users] == [n.name for n in old.users]
    named(copy, "b")[0].meta["val"] = None
    assert named(graph, "b")[0].meta["val"] is not None


def test_what_only_the_old_node_needed_goes_and_nothing_else(graph):
    x, relu, a, b, out = named(graph, "x", "relu", "a", "b", "out")
    emit = Emitter(graph, out, x, 0)
    # In place on what others see, and on what was made for it alone.
    seen = emit.method("add_", emit.method("view", b, 2, 3), 1)
    filled = emit.method("mul_", emit.function(torch.add, (b, 1), {}, "own"), 0)
    old = emit.function(operator.add, (seen, filled), {}, "old")
    out.args = (a, old)
    assert replace_and_erase(graph, old, a) == 3
    graph.lint()
    assert [n.name for n in graph.nodes] == [
        "x",
        "relu",
        "a",
        "b",
        "view",
        seen.name,
        "out",
        "output",
    ]
    assert out.args == (a, a)
    assert replace_and_erase(graph, a, relu) == 1
    assert [n.name for n in graph.nodes][:3] == ["x", "relu", "b"]
    graph.lint()
