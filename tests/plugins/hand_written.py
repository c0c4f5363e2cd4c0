"""Graphs that tests write by hand, node by node, with fake values."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sparda_compile.graph.emit import propagate
from sparda_compile.sizes import NUM_TOKENS, SAMPLES


class Written:
    """A graph, and the nodes that compute in it, in order."""

    def __init__(self):
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.nodes = []

    def input(self, name, *shape, dtype=torch.float32):
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def size(self, name=NUM_TOKENS, number=SAMPLES.tokens):
        node = self.graph.placeholder(name)
        node.meta["val"] = number
        return node

    def method(self, name, *args, **kwargs):
        return self._add(self.graph.call_method(name, args, kwargs))

    def function(self, function, *args, **kwargs):
        return self._add(self.graph.call_function(function, args, kwargs))

    def _add(self, node):
        with self.mode:
            node.meta["val"] = propagate(node)
        self.nodes.append(node)
        return node
