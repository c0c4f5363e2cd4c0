"""Nodes at some positions of a long prompt equal those of the whole prompt, or are refused."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from sparda_compile.graph.evaluate import NotProvableError, ancestors
from sparda_compile.graph.sampled import Positions, constants_of, evaluate_at
from sparda_compile.sizes import NUM_TOKENS

LENGTH = 101
VALUES = torch.tensor([0, 1, 5, 30, 31, 64, 100])
SIZE = len(VALUES)


def graph_of(function):
    """Trace a function of the prompt's length; a stand-in for its fake values goes into `meta`."""
    graph = fx.Graph()
    n = graph.placeholder(NUM_TOKENS)
    graph.output(function(fx.Proxy(n)).node)
    run = {n: LENGTH}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method"):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), run.__getitem__)
            is_method = node.op == "call_method"
            call = getattr(args[0], node.target) if is_method else node.target
            run[node] = call(*(args[1:] if is_method else args), **kwargs)
            node.meta["val"] = run[node]
    n.meta["val"] = LENGTH
    target = next(iter(reversed(graph.nodes))).args[0]
    return target, run[target]


def at(target):
    return evaluate_at(target, Positions(VALUES, LENGTH), {}, {})


def index(n):
    return torch.arange(n)


MASKS = {
    "causal": lambda n: index(n)[:, None] >= index(n),
    "window": lambda n: (index(n)[:, None] - index(n) < 30) & (index(n)[:, None] >= index(n)),
    "tril": lambda n: torch.tril(torch.ones(n, n)),
    "triu": lambda n: torch.triu(torch.full((n, n), -1e9), diagonal=1),
    "band": lambda n: torch.ones(n, n).tril().triu(-29),
    "chunks": lambda n: index(n)[:, None] // 30 == index(n) // 30,
    "of the end": lambda n: (index(n) > n - 40) | (index(n)[:, None] < n // 2),
    "table": lambda n: torch.ones(300, 300).tril()[:n, :n],
    "masked": lambda n: torch.zeros(n, n).masked_fill(index(n)[:, None] < index(n), -1e4),
    "shifted": lambda n: torch.arange(5, n + 5)[:, None] >= torch.arange(5, n + 5),
    "gathered": lambda n: torch.ones(n)[index(n)] > index(n)[:, None],
    "softmax": lambda n: (
        torch.zeros(n, n).masked_fill(index(n)[:, None] < index(n), -1e9).softmax(-1).gt(0)
    ),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_equals_the_whole_mask_at_these_positions(mask, monkeypatch):
    monkeypatch.setattr(fx.proxy.Proxy, "__index__", lambda self: 0, raising=False)
    target, whole = graph_of(fx_wrapped(mask))
    rows = whole if whole.shape[0] == 1 else whole[VALUES]
    want = rows if rows.shape[1] == 1 else rows[:, VALUES]
    assert torch.equal(at(target), want)


def fx_wrapped(mask):
    """Let torch's constructors of a proxy be traced."""

    def traced(n):
        names = ("arange", "ones", "zeros", "full")
        real = {name: getattr(torch, name) for name in names}
        try:
            for name in names:
                setattr(torch, name, _caller(n, real[name]))
            return mask(n)
        finally:
            for name in names:
                setattr(torch, name, real[name])

    return traced


def _caller(proxy, function):
    return lambda *args, **kwargs: proxy.tracer.create_proxy(
        "call_function", function, args, kwargs
    )


REFUSED = {
    "cumsum": (lambda n: torch.ones(n).cumsum(0), "cumsum mixes tokens"),
    "flip": (lambda n: index(n).flip(0), "flip mixes tokens"),
    "roll": (lambda n: index(n).roll(1), "roll mixes tokens"),
    "max over tokens": (lambda n: torch.ones(n, n).max(), "max mixes tokens"),
    "cut": (lambda n: index(n)[3:], "cuts off tokens"),
    "stride": (lambda n: index(n)[::2], "skips tokens"),
    "one token": (lambda n: index(n)[3], "single tokens"),
    "backwards": (lambda n: torch.arange(n, 0, -1), "counts positions"),
    "gathered far": (lambda n: torch.ones(n)[index(n) + 1], "gathered by an index"),
    "short table": (lambda n: torch.ones(64, 64).tril()[:n], "64 positions|mixes|cuts|mask"),
    "over queries": (lambda n: torch.ones(n, n).softmax(0), "not over the keys"),
}


@pytest.mark.parametrize(("mask", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_known_is_refused(mask, words):
    try:
        target, _ = graph_of(fx_wrapped(mask))
    except IndexError:  # the whole prompt cannot have it either
        return
    with pytest.raises(NotProvableError, match=words):
        at(target)


def test_constants_are_those_that_nodes_and_small_tables_have():
    target, _ = graph_of(fx_wrapped(MASKS["window"]))
    assert {30, 31} <= constants_of(ancestors(target, ()), {})
    graph = fx.Graph()
    node = graph.placeholder("window")
    assert constants_of([node], {"window": torch.tensor(77)}) == {77, 78}
    assert constants_of([node], {"window": torch.arange(5000)}) == set()
