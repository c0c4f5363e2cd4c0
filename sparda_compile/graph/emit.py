"""The one way to add a node to a graph."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sparda_compile.graph.fake_runner import FakeRunner, leaves_of
from sparda_compile.graph.nodes import fake_value
from sparda_compile.graph.tags import LAYER
from sparda_compile.isa.table import instruction_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


__all__ = ["Emitter", "clone_region", "fake_arguments", "mapped_arguments", "new_fake", "propagate"]


def clone_region(
    region: Iterable[fx.Node],
    order: dict[fx.Node, int],
    replace: dict[fx.Node, fx.Node],
    emitter: Emitter,
) -> dict[fx.Node, fx.Node]:
    """Copy nodes to the emitter's place in the program, with some inputs replaced.

    Args:
        region: Nodes to copy.
        order: Place of each node in the program.
        replace: Inputs of the region -> what stands for them in the copy.
        emitter: Where the copies go.

    Returns:
        Each node of the region -> its copy, `replace` included.
    """
    mapping = dict(replace)
    for node in sorted(region, key=lambda n: order[n]):
        if node not in mapping:
            mapping[node] = emitter.copy(node, mapping)
    return mapping


class Emitter:
    """Adds nodes before a point of the graph, with metadata and a fake value each.

    Args:
        graph: The graph to add to.
        before: Node that new ones are put before.
        like: Node whose stack trace and module path new ones take.
        layer: Layer that new ones are for.
    """

    def __init__(self, graph: fx.Graph, before: fx.Node, like: fx.Node, layer: int) -> None:
        self.graph = graph
        self.before = before
        self.like = like
        self.layer = layer

    def call(self, op: str, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """Add a call of `sparda.<op>`; returns its node."""
        target = getattr(torch.ops.sparda, op).default
        return self.function(target, args, kwargs, name or f"{op}_{self.layer}")

    def function(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None = None
    ) -> fx.Node:
        """Add a call of any function."""
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node("call_function", target, args, kwargs, name)
        return self._finish(node, self.like)

    def method(self, name: str, *args: Any) -> fx.Node:
        """Add a call of a tensor method on the first argument."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_method(name, args)
        return self._finish(node, self.like)

    def item(self, node: fx.Node, index: int, name: str | None = None) -> fx.Node:
        """Add the choice of one of a node's results."""
        import operator

        return self.function(operator.getitem, (node, index), {}, name)

    def copy(self, node: fx.Node, mapping: dict[fx.Node, fx.Node]) -> fx.Node:
        """Add a copy of a node with mapped inputs, under a name of its own."""
        args, kwargs = mapped_arguments(node, lambda old: mapping.get(old, old))
        with self.graph.inserting_before(self.before):
            new = self.graph.create_node(node.op, node.target, args, kwargs)
        return self._finish(new, node)

    def _finish(self, node: fx.Node, like: fx.Node) -> fx.Node:
        for key in ("stack_trace", "nn_module_stack"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        LAYER.put(node, self.layer)
        node.meta["val"] = propagate(node)
        return node


def mapped_arguments(node: fx.Node, change: Callable[[fx.Node], Any]) -> tuple[Any, Any]:
    """Return a node's arguments with something else in the place of each node."""
    return fx.node.map_arg(node.args, change), fx.node.map_arg(node.kwargs, change)


def fake_arguments(node: fx.Node, value: Callable[[fx.Node], Any] = fake_value) -> tuple[Any, Any]:
    """Return a node's arguments with values in the place of nodes, and event 0 for any event."""
    args, kwargs = mapped_arguments(node, value)
    place = _event_place(node.target)
    if place is not None and place < len(args):
        args = (*args[:place], 0, *args[place + 1 :])
    return args, kwargs


def propagate(node: fx.Node) -> Any:
    """Compute a node's fake value from those of its inputs."""
    from torch._subclasses.fake_tensor import FakeTensor

    fakes = [fake_value(n) for n in node.all_input_nodes]
    mode = next((f.fake_mode for f in leaves_of(fakes) if isinstance(f, FakeTensor)), None)
    args, kwargs = fake_arguments(node)
    function = node.target
    if node.op == "call_method":
        function = getattr(Tensor, str(node.target))
    assert callable(function)
    if mode is None:  # what is computed from sizes alone
        return function(*args, **kwargs)
    with torch.no_grad():
        return FakeRunner.of(mode).run(function, args, kwargs)


def new_fake(like: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a contiguous fake tensor of the mode and device of another one."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    runner = FakeRunner.of(like.fake_mode)
    return runner.new(tuple(shape), tuple(reversed(strides)), dtype, like.device)


@functools.cache
def _event_place(target: Any) -> int | None:
    """Return which argument of an op is the number of an event."""
    it = instruction_of(target)
    return it.places.get("event") if it is not None else None
