from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from sparda_compile.capture.causal_lm import as_causal_lm
from sparda_compile.capture.forward import capture
from sparda_compile.config import SpardaConfig
from sparda_compile.graph.nodes import call_name
from sparda_compile.graph.site import AttentionSite, sites_of
from sparda_compile.passes.base import PassContext
from sparda_compile.passes.find import attention_proof
from sparda_compile.passes.find.attention_proof import (
    ends_in_one,
    find_difference,
    measure_scale,
    reference_attention,
)
from sparda_compile.passes.find.find_attention import FindAttention
from sparda_compile.passes.machine import MACHINES
from sparda_compile.testing import PlainCausalLM


def qkv(num_tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, num_tokens, 5), (2, 3, num_tokens, 5), (2, 3, num_tokens, 5)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def test_reference_attention_is_that_of_torch() -> None:
    q, k, v = qkv()
    want = functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, scale=0.4
    )
    torch.testing.assert_close(reference_attention(q, k, v, 0.4, 0.0, 0), want)


@pytest.mark.parametrize("window", [1, 3, 7, 20])
def test_window_counts_the_token_itself(window: int) -> None:
    q, k, v = qkv()
    got = reference_attention(q, k, v, 0.4, 0.0, window)
    for t in range(7):
        first = max(0, t - window + 1)
        seen = k[:, :, first : t + 1], v[:, :, first : t + 1]
        want = functional.scaled_dot_product_attention(
            q[:, :, t : t + 1], *seen, enable_gqa=True, scale=0.4
        )
        torch.testing.assert_close(got[:, :, t : t + 1], want)


def test_soft_cap_bounds_the_scores() -> None:
    q, k, v = qkv(2)
    got = reference_attention(q * 1000, k, v, 1.0, 0.5, 0)[0, 0, 1]
    raw = 1000 * (k[0, 0] @ q[0, 0, 1])
    want = (0.5 * torch.tanh(raw / 0.5)).softmax(0) @ v[0, 0]
    torch.testing.assert_close(got, want)
    ratio = (0.5 * torch.tanh(raw / 0.5)).softmax(0).max()
    assert ratio <= 1 / (1 + math.exp(-1.0)) + 1e-9


@functools.cache
def first_site(phase: str = "prefill") -> tuple[AttentionSite, dict[str, Tensor]]:
    """Return a hand-made module's first site, with keys that are repeated for their heads."""
    model = PlainCausalLM(group_form="repeat_interleave", num_heads=6, num_groups=3)
    captured = capture(as_causal_lm(model), phase, last_logits_only=True)
    gm = captured.copy()
    ctx = PassContext(
        SpardaConfig(), phase, {}, "Model", None, MACHINES["cpu"], 1, captured.weights
    )
    FindAttention()(gm, ctx)
    return sites_of(gm.graph)[0], captured.weights


def difference(site: AttentionSite, weights: dict[str, Tensor], **claims: Any) -> str:
    known = {site.k: site.k, site.v: site.v}
    claims = {"scale": site.scale, "softcap": 0.0, "window": 0} | claims
    return find_difference(site.anchor, site.query, site.k, site.v, known, weights, **claims)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_what_is_true_has_no_difference(phase: str) -> None:
    assert difference(*first_site(phase)) == ""


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"scale": 0.26}, "scale 0.26"),
        ({"scale": 0.2501}, "scale 0.2501"),
        ({"softcap": 5.0}, "soft cap 5"),
        ({"window": 8}, "window 8"),
        ({"window": 23}, "window 23"),
    ],
)
def test_what_is_false_is_named(claims: dict[str, float], words: str) -> None:
    message = difference(*first_site(), **claims)
    assert words in message
    assert "relative difference" in message


def test_keys_and_values_are_not_confused() -> None:
    site, weights = first_site()
    message = find_difference(
        site.anchor, site.query, site.k, site.v, {site.k: site.v, site.v: site.k}, weights,
        scale=site.scale, softcap=0.0, window=0,
    )  # fmt: skip
    assert "not causal attention" in message


def scores_graph(factor: float) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Return q, k and (q * factor) @ k^T, whose shapes are those of one head of width 9."""
    graph = fx.Graph()
    q, k = graph.placeholder("q"), graph.placeholder("k")
    k_t = graph.call_method("transpose", (k, -1, -2))
    scores = graph.call_function(torch.matmul, (graph.call_method("mul", (q, factor)), k_t))
    graph.output((scores,))
    q.meta["val"], k.meta["val"] = torch.zeros(1, 1, 2, 9), torch.zeros(1, 1, 2, 9)
    return q, k, scores


@pytest.mark.parametrize("factor", [0.125, 1.0, 9**-0.5, 3.0, -0.5])
def test_scale_is_measured(factor: float) -> None:
    q, k, scores = scores_graph(factor)
    assert measure_scale(scores, q, k, {k: k}, {}) == pytest.approx(factor, rel=1e-5)


@pytest.mark.parametrize("nice", [1.0, 9**-0.5])
def test_scale_near_a_usual_one_is_that_one(nice: float) -> None:
    q, k, scores = scores_graph(nice * (1 + 1e-6))
    assert measure_scale(scores, q, k, {k: k}, {}) == nice
    q, k, scores = scores_graph(nice * 1.001)
    assert measure_scale(scores, q, k, {k: k}, {}) == pytest.approx(nice * 1.001, rel=1e-6)


def test_nodes_that_cannot_be_run_are_a_difference() -> None:
    site, weights = first_site()
    graph = site.anchor.graph
    with graph.inserting_after(site.anchor):
        broken = graph.call_method("reshape", (site.anchor, -1, 12345))
    try:
        known = {site.k: site.k, site.v: site.v}
        message = find_difference(
            broken, site.query, site.k, site.v, known, weights,
            scale=site.scale, softcap=0.0, window=0,
        )  # fmt: skip
    finally:
        graph.erase_node(broken)
    assert "cannot be run alone (RuntimeError" in message
    assert call_name(site.anchor) == "scaled_dot_product_attention"


@pytest.mark.parametrize(
    ("value", "is_meta", "expected"),
    [(1.0, False, True), (0.5, False, False), (1.0, True, False)],
)
def test_constant_behind_a_query_is_seen(value: float, is_meta: bool, expected: bool) -> None:
    """As a number in the graph, or as a buffer whose value is known."""
    site, weights = first_site("decode")
    graph = site.anchor.graph
    assert not ends_in_one(site.query, site.projection, weights)
    with graph.inserting_before(site.anchor):
        padded = graph.call_function(functional.pad, (site.query, (0, 1)), {"value": value})
    with graph.inserting_after(next(n for n in graph.nodes if n.op == "placeholder")):
        buffer = graph.placeholder("table")
    with graph.inserting_before(site.anchor):
        joined = graph.call_function(torch.cat, ((site.query, buffer), -1))
    buffer.meta["val"] = torch.empty(2, 6, 1, 1)
    known = torch.full((2, 6, 1, 1), value, device="meta" if is_meta else "cpu")
    assert ends_in_one(padded, site.projection, weights) == (value == 1)
    try:
        assert ends_in_one(joined, site.projection, weights | {"table": known}) == expected
        parameter = torch.nn.Parameter(known)
        assert not ends_in_one(joined, site.projection, weights | {"table": parameter})
    finally:
        for node in (joined, padded, buffer):
            graph.erase_node(node)


def test_layers_of_one_shape_are_compared_with_one_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And each of them is run: nodes that write to their inputs change nobody else's."""
    site, weights = first_site()
    attention_proof._case.cache_clear()
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return reference_attention(*args, **kwargs)

    monkeypatch.setattr(attention_proof, "reference_attention", counted)

    def spoils(*args: Any) -> Tensor:
        result = evaluate(*args)
        for value in args[1].values():
            value.zero_()
        return result

    evaluate = attention_proof.evaluate
    monkeypatch.setattr(attention_proof, "evaluate", spoils)
    assert [difference(site, weights) for _ in range(3)] == ["", "", ""]
    assert len(calls) == 1
    assert difference(site, weights, window=8) != ""
    assert len(calls) == 2
