"""What a hint computes is one op behind this rewrite, and the same numbers."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.graph.effects import argument, results_of
from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.nodes import (
    call_name,
    fake_value,
    find_ops,
    is_sparda,
    program_order,
    snapshot,
    tensor_shape,
)
from sparda_compile.graph.side_piece import side_piece_of
from sparda_compile.graph.site import sites_of
from sparda_compile.graph.tags import HINT, LAYER
from sparda_compile.passes.rewrite.hint_pieces import put_in_piece
from sparda_compile.sizes import SAMPLES

MODELS = ("llama", "qwen3", "gemma3", "phi3")
# Hint, and the inner width of its projection.
HINTS = (("forecast", None), ("forecast", 8), ("next_query", None), ("mixture", None))


@pytest.fixture
def hinted(plan_of):
    """Return a function that gives the graph in front of this rewrite."""

    def graph(hint, model="llama", **settings):
        plan = plan_of(model, mode="exact", hint=hint, machine="h200", **settings)
        return snapshot(plan.stage("fuse_projections")).graph

    return graph


def of_hint(graph, layer):
    """Return the nodes of the model that a hint has added for a layer."""
    mine = [n for n in graph.nodes if HINT.on(n) and LAYER.of(n) == layer]
    return [n for n in mine if n.op != "placeholder" and not is_sparda(n)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("hint", "rank"), HINTS)
def test_a_hint_s_nodes_are_one_op(hinted, hint, model, rank):
    graph = hinted(hint, model, forecast_rank=rank)
    layers = {LAYER.of(n) for n in graph.nodes if HINT.on(n)}
    assert layers
    for layer in layers:
        nodes = of_hint(graph, layer)
        (output,) = {n for n in nodes if any(u not in nodes for u in n.users)}
        shape, users = tensor_shape(output), {u.name for u in output.users if u not in nodes}
        taken = dict.fromkeys(n for node in nodes for n in node.all_input_nodes)
        assert put_in_piece(graph, hint, layer, "hint_") == 1
        (made,) = [n for n in find_ops(graph, "run_piece") if LAYER.of(n) == layer]
        assert made.name == f"hint_piece_{layer}"
        assert HINT.of(made) == hint
        assert tensor_shape(made) == shape
        assert fake_value(made).is_contiguous()
        assert {u.name for u in made.users} == users
        given = {n for n in taken if n not in nodes and n.name != "batch_size"}
        assert set(argument(made, "inputs")) == given
        assert [n.name for n in argument(made, "sizes")] == ["batch_size"]
        # The model's own nodes stay: none of these is a hint's.
        assert of_hint(graph, layer) == []
        order = program_order(graph)
        assert order[made] < min(order[u] for u in made.users)
    graph.lint()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("hint", ["forecast", "next_query"])
def test_the_op_computes_what_the_nodes_did(hinted, hint, batch):
    before, after = hinted(hint), hinted(hint)
    nodes = of_hint(before, 1)
    put_in_piece(after, hint, 1, "hint_")
    (made,) = find_ops(after, "run_piece")
    generator = torch.Generator().manual_seed(batch)
    values = {}
    for node in argument(made, "inputs"):
        shape = [batch if s == SAMPLES.batch else s for s in tensor_shape(node)]
        values[node.name] = torch.randn(shape, generator=generator)
    result = torch.full((batch, *tensor_shape(made)[1:]), float("nan"))
    side_piece_of(made).graph_module(batch, *values.values(), result)
    for node in nodes:

        def value(source):
            return values.get(source.name, batch)

        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
        function = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target
        values[node.name] = function(*args, **kwargs)
    assert torch.equal(result, values[nodes[-1].name])


def test_layers_share_a_piece(hinted):
    graph = hinted("forecast")
    for layer in (0, 1):
        assert put_in_piece(graph, "forecast", layer, "hint_") == 1
    assert len({argument(n, "piece") for n in find_ops(graph, "run_piece")}) == 1


@pytest.mark.parametrize("hint", ["ema", "previous_step", "previous_layer"])
def test_hints_that_compute_nothing_of_the_model_s_have_no_piece(hinted, hint):
    graph = hinted(hint)
    before = len(graph.nodes)
    assert [put_in_piece(graph, hint, layer, "hint_") for layer in (0, 1)] == [0, 0]
    assert len(graph.nodes) == before


def two_outputs(graph, nodes):
    emit = Emitter(graph, nodes[-1].next, nodes[-1], -1)
    emit.method("neg", nodes[0])  # of another layer, and so no part of it


def in_place(graph, nodes):
    last = nodes[-1]
    with graph.inserting_after(last):
        changed = graph.call_method("add_", (last, 1))
    changed.meta = dict(last.meta)
    last.replace_all_uses_with(changed, lambda user: user is not changed)


def taken_before_its_end(graph, nodes):
    """Something else takes the result and gives back what a node of the hint takes."""
    emit = Emitter(graph, nodes[-1].next, nodes[-1], -1)
    outside = emit.method("neg", nodes[-1])
    with graph.inserting_after(outside):
        back = graph.call_method("add", (outside, nodes[-1]))
    back.meta = dict(nodes[-1].meta)


@pytest.mark.parametrize("change", [two_outputs, in_place, taken_before_its_end])
def test_what_one_op_cannot_do_stays_as_it_is(hinted, change):
    graph = hinted("forecast")
    change(graph, of_hint(graph, 1))
    before = [n.name for n in graph.nodes]
    assert put_in_piece(graph, "forecast", 1, "hint_") == 0
    assert [n.name for n in graph.nodes] == before


def test_what_the_model_computes_is_left_alone(hinted):
    graph = hinted("next_query")
    own = [site.query.name for site in sites_of(graph)]
    linears = [n.name for n in graph.nodes if call_name(n) == "linear" and not HINT.on(n)]
    put_in_piece(graph, "next_query", 1, "hint_")
    left = {n.name for n in graph.nodes}
    assert {*own, *linears} <= left
    assert results_of(find_ops(graph, "run_piece")[0]) == ()
