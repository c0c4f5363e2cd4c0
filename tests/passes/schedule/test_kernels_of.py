"""Where kernels begin, in graphs that are small enough to count by hand."""

from __future__ import annotations

import torch
from torch import fx, nn

from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.nodes import call_name, find_ops, is_sparda
from sparda_compile.passes.schedule.kernels_of import begin_kernels


class Layer(nn.Module):
    """A feed-forward network with its norm and residual."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(torch.zeros(4, 4)) for _ in range(3))

    def forward(self, x):
        linear = nn.functional.linear
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1.0)
        inner = nn.functional.silu(linear(normed, self.gate)) * linear(normed, self.up)
        return x + linear(inner, self.down)


class Twice(nn.Module):
    """Two layers, so that what is behind the first is fused with the norm of the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Layer(), Layer()

    def forward(self, x):
        return self.second(self.first(x.neg()))


class Parts(nn.Module):
    """One product whose parts are used apart, as queries and keys are."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.zeros(8, 4))

    def forward(self, x):
        q, k = nn.functional.linear(x, self.both).split([4, 4], -1)
        return q.view(-1, 4).neg() * k.view(-1, 4).cos()


def begun(model):
    graph = fx.symbolic_trace(model).graph
    found = begin_kernels(graph)
    return [node.name for node in graph.nodes if node in found]


def test_products_are_kernels_and_what_follows_one_begins_another():
    assert begun(Layer()) == ["linear", "silu", "linear_1", "linear_2", "add_1"]


def test_a_residual_is_fused_with_the_norm_behind_it():
    names = begun(Twice())
    assert len(names) == 10
    assert [name for name in names if name.startswith("add")] == ["add_1", "add_3"]


def test_parts_of_one_product_begin_one_kernel():
    assert begun(Parts()) == ["linear", "neg"]


def test_an_event_is_no_kernel():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, device="meta")
    emit = Emitter(graph, graph.output((x,)), x, 0)
    recorded = emit.call("record_event", [x], 1, 0)
    emit.function(torch.neg, (recorded,), {}, "behind_an_event")
    assert begin_kernels(graph) == set()


def test_ops_of_ours_are_kernels_that_end_what_is_fused(plan_of):
    graph = plan_of("llama", mode="forecast", machine="h200").graph_module.graph
    found = begin_kernels(graph)
    assert not any(is_sparda(node) for node in found)
    # Of each layer the products are q, k, v, the Forecast's, o, gate, up and down; the first layer
    # makes two Forecasts and the last one none. With the table of tokens and the logits.
    names = [call_name(node) for node in graph.nodes if node in found]
    layers = len(find_ops(graph, "sparse_attention"))
    assert names.count("linear") == 8 * layers + 1
    assert names.count("embedding") == 1
    # Norms and residuals begin one behind o and one behind down, and silu one.
    assert names.count("silu") == layers
