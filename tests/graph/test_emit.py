"""The emitter."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sparda_compile.graph.emit import Emitter, clone_region
from sparda_compile.graph.nodes import (
    fake_value,
    module_path,
    program_order,
    tensor_shape,
)
from sparda_compile.graph.tags import LAYER


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


def test_region_is_copied_with_other_inputs(graph):
    x, relu, a, b, out = named(graph, "x", "relu", "a", "b", "out")
    emit = Emitter(graph, out.next, x, 5)
    other = emit.function(torch.neg, (x,), {}, "other")
    copies = clone_region({out, a, b}, program_order(graph), {relu: other}, emit)
    assert set(copies) == {relu, a, b, out}
    assert copies[a].args == (other, 1)
    assert copies[out].args == (copies[a], copies[b])
    assert out.args == (a, b)
    assert {LAYER.of(copies[n]) for n in (a, b, out)} == {5}
    graph.lint()


def test_emitted_node_has_value_layer_place_and_origin(graph):
    (a, out) = named(graph, "a", "out")
    a.meta |= {"stack_trace": "line 3", "nn_module_stack": {"k": ("L['m'].mlp", int)}, "other": 1}
    node = Emitter(graph, out, a, 7).method("view", a, 6)
    assert node.next is out
    assert tensor_shape(node) == (6,)
    assert fake_value(node).fake_mode is fake_value(a).fake_mode
    assert LAYER.of(node) == 7
    assert node.meta["stack_trace"] == "line 3"
    assert module_path(node) == module_path(a)
    assert "other" not in node.meta


def test_emitted_op_has_its_name_and_results(graph):
    (a, out) = named(graph, "a", "out")
    emit = Emitter(graph, out, a, 2)
    ids = emit.function(torch.zeros_like, (a,), {"dtype": torch.int32}, "ids")
    assert emit.call("recall_ids", ids).name == "recall_ids_2"
    assert emit.call("recall_ids", ids, name="guess").name == "guess"
    pair = emit.function(torch.topk, (a, 1), {}, "pair")
    item = emit.item(pair, 1, "best")
    assert (item.name, tensor_shape(item), fake_value(item).dtype) == ("best", (2, 1), torch.int64)
