"""Anchors: where an attention ends, in both forms that models write it in."""

from __future__ import annotations

import pytest

from sparda_compile.capture.forward import capture
from sparda_compile.graph.nodes import call_name
from sparda_compile.passes.find.anchors import marker_of, match_anchor, scale_of, softcap_of
from sparda_compile.passes.find.dataflow import Dataflow
from sparda_compile.testing import build


def anchors(name, attn="sdpa"):
    captured = capture(build(name, attn_implementation=attn), "decode", last_logits_only=True)
    graph = captured.graph_module.graph
    flow = Dataflow(graph)
    found = [anchor for node in graph.nodes if (anchor := match_anchor(node, flow)) is not None]
    return captured, found


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_every_attention_is_one_anchor_of_its_form(attn):
    _, found = anchors("llama", attn)
    assert len(found) == 2
    for layer, anchor in enumerate(found):
        assert anchor.form == attn
        marker = marker_of(anchor)
        assert marker is not None
        assert marker.args[2] == layer
        assert (call_name(anchor.node) == "matmul") == (attn == "eager")


def test_what_is_not_given_is_measured():
    for attn in ("sdpa", "eager"):
        captured, found = anchors("llama", attn)
        anchor = found[0]
        k = marker_of(anchor).args[0]
        softcap = softcap_of(anchor, captured.weights)
        assert softcap == 0.0
        if attn == "sdpa":
            assert scale_of(anchor, k, {}, softcap, captured.weights) == 16**-0.5
