"""Real values of a graph's nodes."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from sparda_compile.graph.evaluate import NotProvableError, evaluate


def scores_graph(factor: float) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Return q, k and (q * factor) @ k^T, whose shapes are those of one head of width 9."""
    graph = fx.Graph()
    q, k = graph.placeholder("q"), graph.placeholder("k")
    k_t = graph.call_method("transpose", (k, -1, -2))
    scores = graph.call_function(torch.matmul, (graph.call_method("mul", (q, factor)), k_t))
    graph.output((scores,))
    q.meta["val"], k.meta["val"] = torch.zeros(1, 1, 2, 9), torch.zeros(1, 1, 2, 9)
    return q, k, scores


def test_evaluate_computes_from_what_is_known_and_nothing_above() -> None:
    q, _, scores = scores_graph(2.0)
    middle = scores.args[0]
    k_t = scores.args[1]
    assert isinstance(middle, fx.Node)
    assert isinstance(k_t, fx.Node)
    one = torch.ones(1, 1, 1, 9)
    got = evaluate(scores, {middle: one, k_t: one.transpose(-1, -2)}, {}, 2)
    assert got.tolist() == [[[[9.0]]]]
    assert evaluate(middle, {q: one}, {}, 2).tolist() == (2 * one).tolist()


def test_evaluate_gives_inputs_their_positions_and_buffers_their_values() -> None:
    graph = fx.Graph()
    positions, table = graph.placeholder("l_position_ids_"), graph.placeholder("table")
    total = graph.call_function(torch.add, (positions, table))
    graph.output((total,))
    positions.meta["val"] = torch.zeros(2, 4, dtype=torch.long)
    table.meta["val"] = torch.zeros(4, dtype=torch.long)
    weights = {"table": torch.tensor([10, 20, 30, 40])}
    assert evaluate(total, {}, weights, 4).tolist() == [[10, 21, 32, 43]] * 2
    with pytest.raises(NotProvableError, match="buffer table, which has no values"):
        evaluate(total, {}, {"table": weights["table"].to("meta")}, 4)
    parameter = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(NotProvableError, match="parameter table"):
        evaluate(total, {}, {"table": parameter}, 4)
