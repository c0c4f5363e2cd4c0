from __future__ import annotations

import dataclasses

import torch
from torch import fx

from sparda_compile.graph.tags import LAYER
from sparda_compile.hints.previous_layer import PreviousLayerHint


@dataclasses.dataclass
class Point:
    """What this hint looks at."""

    target: object
    block_ids: dict[int, fx.Node]


@dataclasses.dataclass
class Site:
    layer: int


def point(layer, shapes):
    graph, block_ids = fx.Graph(), {}
    for number, shape in shapes.items():
        block_ids[number] = graph.placeholder(f"ids_{number}")
        block_ids[number].meta["val"] = torch.empty(shape, dtype=torch.int32)
    return Point(Site(layer), block_ids)


def test_first_layer_has_nothing_to_go_by():
    assert PreviousLayerHint().emit(point(0, {0: (1, 2, 3), 1: (1, 2, 3)})) is None


def test_nearest_sparse_layer_before_is_taken():
    here = point(4, {0: (1, 2, 3), 2: (1, 2, 3), 4: (1, 2, 3), 5: (1, 2, 3)})
    assert PreviousLayerHint().emit(here) is here.block_ids[2]


def test_layer_of_another_shape_is_no_hint():
    assert PreviousLayerHint().emit(point(1, {0: (1, 4, 3), 1: (1, 2, 3)})) is None


def test_prefetch_of_a_layer_follows_the_selection_of_the_one_before(lab):
    graph = lab.decode_graph("insert_prefetch", mode="exact", hint="previous_layer")
    hints = [n for n in graph.nodes if n.name.startswith("hint_plan_")]
    ids = lab.ops(graph, "select_blocks")
    assert [LAYER.of(n) for n in hints] == list(range(1, lab.num_layers))
    for node in hints:
        assert node.args[0] is ids[LAYER.of(node) - 1]
