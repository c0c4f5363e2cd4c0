"""A graph as text."""

from __future__ import annotations

import torch
from torch import fx

from sparda_compile.graph.text import graph_text


def test_text_has_a_line_for_each_node_with_its_shape():
    gm = fx.symbolic_trace(lambda x, unused: torch.cat([x[..., 1:], x], dim=0))
    for node in gm.graph.nodes:
        node.meta["val"] = torch.empty(2, 3) if node.name == "x" else None
    assert graph_text(gm.graph).split("\n") == [
        "%x: float32[2, 3] = input",
        "%getitem = getitem(%x, [..., 1:])",
        "%cat = cat([%getitem, %x], dim=0)",
        "return cat",
    ]
