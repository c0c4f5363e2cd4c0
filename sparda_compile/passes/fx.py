"""Small pure helpers on FX nodes, and the one way to add a node."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sparda_compile.fake_runner import FakeRunner, leaves_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "Emitter",
    "call_name",
    "changes_in_place",
    "clone_region",
    "copy_graph",
    "fake_arguments",
    "fake_value",
    "find_ops",
    "is_sparda",
    "mapped_arguments",
    "module_path",
    "new_fake",
    "nodes_between",
    "program_order",
]


def call_name(node: fx.Node) -> str:
    """Return what a node calls as a short word: `linear`, `view`, `sparda.select_blocks`."""
    return _target_name(node.target)


@functools.cache
def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name.replace("::", "."))
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    if isinstance(target, str):
        is_operator = target.startswith("__") and target.endswith("__")
        return target[2:-2] if is_operator else target
    return str(getattr(target, "__name__", target))


def is_sparda(node: fx.Node) -> bool:
    """Whether a node calls one of this library's ops."""
    return node.op == "call_function" and call_name(node).startswith("sparda.")


def find_ops(graph: fx.Graph, *names: str) -> list[fx.Node]:
    """Return the nodes that call `sparda.<name>`, in program order."""
    packets = [getattr(torch.ops.sparda, name) for name in names]
    targets = [target for packet in packets for target in (packet, packet.default)]
    found = [
        node for target in targets
        for node in graph.find_nodes(op="call_function", target=target, sort=False)
    ]  # fmt: skip
    return sorted(found)


def fake_value(node: fx.Node) -> Any:
    """Return the fake value of a node."""
    return node.meta.get("val")


def program_order(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return each node's place in the program."""
    return {node: i for i, node in enumerate(graph.nodes)}


def module_path(node: fx.Node) -> str:
    """Return the path of the module that a node came from, `model.layers.0.self_attn`."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    return str(stack[-1][0])


def nodes_between(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Return the nodes on any path from `start` (left out) to `end` (taken in)."""
    above: set[fx.Node] = {end}
    stack = [end]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source > start and source not in above:
                above.add(source)
                stack.append(source)
    between: set[fx.Node] = set()
    stack = [start]
    while stack:
        for user in stack.pop().users:
            if user in above and user not in between:
                between.add(user)
                stack.append(user)
    return between


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
        node.meta["sparda_layer"] = self.layer
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
    if not isinstance(target, torch._ops.OpOverload):
        return None
    names = [argument.name for argument in target._schema.arguments]
    return names.index("event") if "event" in names else None


def changes_in_place(node: fx.Node) -> bool:
    """Whether a node changes a tensor that it is given."""
    name = call_name(node)
    return name == "setitem" or (name.endswith("_") and node.op == "call_method")


def tensor_shape(node: fx.Node) -> tuple[Any, ...]:
    """Return the shape of a node's fake value, () when it is no tensor."""
    value = fake_value(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def copy_graph(source: fx.Graph) -> fx.Graph:
    """Return a copy of a graph with the same node names and metadata."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        mapping[node].name = node.name
    for node in graph.nodes:
        if "sparda" in node.meta:  # an attention's site, which has nodes; some may be gone
            node.meta["sparda"] = node.meta["sparda"].mapped(lambda n: mapping.get(n, n))
    return graph
