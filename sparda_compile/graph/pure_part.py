"""Pure parts of a program: consecutive nodes that see no state, no stream and no layer number.

    key        calls, constants and the form of each input: dtype, device, sizes and strides, with
               the open sizes by name
    graph      of its own: takes the open sizes and the tensors, returns a tuple

Parts of one key compute the same from inputs of one form, and share one graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparda_compile.errors import PassError
from sparda_compile.graph.emit import mapped_arguments
from sparda_compile.graph.fake_runner import map_leaves
from sparda_compile.graph.nodes import as_module, changed_root, changes_in_place, fake_value
from sparda_compile.sizes import BATCH_SIZE, NUM_TOKENS, size_of, size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PurePart", "cut_out", "form_of"]


@dataclasses.dataclass(frozen=True)
class PurePart:
    """A pure part of a program.

    Attributes:
        key: The same for parts that compute the same from inputs of the same form.
        graph_module: Takes the open sizes in `sizes`, then the tensors; returns a tuple.
        sizes: `batch_size` and `num_tokens`, those of them that it takes.
        inputs: Nodes of the program that it takes.
        outputs: Nodes of the program that it computes.
    """

    key: str
    graph_module: fx.GraphModule
    sizes: tuple[str, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def cut_out(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> PurePart:
    """Return consecutive nodes of a program as a part.

    Args:
        nodes: In order.
        outputs: Those of them that the rest of the program takes.

    Raises:
        PassError: If they change a tensor in place that they have not made.
    """
    text = _Text(nodes)
    key = text.key(outputs)
    with _LOCK:
        if key not in _GRAPHS:
            _GRAPHS[key] = as_module(_copied(text, nodes, outputs))
    return PurePart(key, _GRAPHS[key], text.sizes, text.inputs, tuple(outputs))


class _Text:
    """Nodes as the text that a key is made of, in which equal pieces are the same.

    Attributes:
        sizes: Open sizes that the part takes.
        inputs: Tensors that it takes.
        numbers: Nodes outside that make a number of open sizes; the part makes it again.
        names: Name of each of all these and of the nodes.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.names: dict[fx.Node, str] = {}
        self.numbers: list[fx.Node] = []
        self._nodes = nodes
        self._inside = set(nodes)
        self.sizes, self.inputs = self._take_inputs()

    def key(self, outputs: Sequence[fx.Node]) -> str:
        """Return what tells the part apart from others."""
        lines = [*self.sizes, *map(self._form, self.inputs)]
        for node in self._nodes:
            self._check_in_place(node)
            for source in node.all_input_nodes:
                self._write_number(source)
            # Names of one layer would be another layer's too.
            name = self.names[node] = f"{_word(node)}_{len(self.names)}"
            lines.append(f"{name} = {self._call(node)} {self._values(node.kwargs)}")
        lines.append("return " + ", ".join(self.names[node] for node in outputs))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _take_inputs(self) -> tuple[tuple[str, ...], tuple[fx.Node, ...]]:
        sizes: dict[str, fx.Node] = {}
        inputs: dict[fx.Node, None] = {}
        for node in self._nodes:
            for source in node.all_input_nodes:
                if source in self._inside:
                    continue
                if isinstance(fake_value(source), Tensor):
                    inputs[source] = None
                else:
                    sizes |= {n.name: n for n in _open_sizes(source)}
        self.names |= {node: name for name, node in sizes.items()}
        self.names |= {node: f"in_{i}" for i, node in enumerate(inputs)}
        # A size that only a shape depends on too: the symbol needs a place to come from.
        taken = {*sizes, *(name for node in inputs for name in _sizes_of(fake_value(node)))}
        return tuple(sorted(taken)), tuple(inputs)

    def _form(self, node: fx.Node) -> str:
        return f"{self.names[node]} {form_of(fake_value(node))}"

    def _write_number(self, node: fx.Node) -> None:
        if node in self.names:
            return
        for source in node.all_input_nodes:
            self._write_number(source)
        self.numbers.append(node)
        self.names[node] = f"({self._call(node)})"

    def _call(self, node: fx.Node) -> str:
        return f"{node.op} {_target(node)} {self._values(node.args)}"

    def _values(self, value: Any) -> str:
        return repr(map_leaves(value, self._leaf)) if value else ""

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            return _Name(self.names[leaf])
        if type(leaf) is int and size_of(leaf).is_open:
            raise PassError(
                f"{leaf} stands for {size_text(leaf)} in the graph, and is passed as a number; a "
                "pass has to use -1 or a node. This is a bug of the pass."
            )
        return leaf

    def _check_in_place(self, node: fx.Node) -> None:
        if not changes_in_place(node):
            return
        if changed_root(node, self._inside) in self._inside:
            return
        raise PassError(
            f"{node.name} ({node.meta.get('stack_trace', 'no trace')}) changes a tensor in place "
            "that was made before an attention or is an input of the model; use the form that "
            "returns a new tensor."
        )


def form_of(value: Tensor) -> str:
    """Return dtype, device, sizes and strides of a fake tensor as a text."""
    shape, strides = ([size_text(s) for s in sizes] for sizes in (value.shape, value.stride()))
    form = f"{value.dtype} {value.device} {shape} {strides}"
    if is_traceable_wrapper_subclass(value):
        # A quantised weight looks like a plain one, and is computed with in another way.
        names, context = value.__tensor_flatten__()
        parts = [f"{name} {form_of(getattr(value, name))}" for name in names]
        kind = type(value)
        form += f" {kind.__module__}.{kind.__qualname__} {context!r} ({', '.join(parts)})"
    return form


def _copied(text: _Text, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.Graph:
    """Return the nodes of a part as a graph of their own."""
    graph = fx.Graph()
    by_name = {name: node for node, name in text.names.items()}
    new: dict[fx.Node, fx.Node] = {}
    for name in (*text.sizes, *(text.names[node] for node in text.inputs)):
        placeholder = graph.placeholder(name)
        if name in by_name:
            new[by_name[name]] = placeholder
            placeholder.meta["val"] = fake_value(by_name[name])
    for node in (*text.numbers, *nodes):
        name = f"size_{len(new)}" if node in text.numbers else text.names[node]
        args, kwargs = mapped_arguments(node, lambda n: new[n])
        new[node] = graph.create_node(node.op, node.target, args, kwargs, name)
        new[node].meta["val"] = fake_value(node)
    results = graph.output(tuple(new[node] for node in outputs))
    results.meta["val"] = tuple(fake_value(node) for node in outputs)
    return graph


class _Name(str):
    """A name inside of a key's text."""

    def __repr__(self) -> str:
        return f"%{self}"


def _open_sizes(node: fx.Node) -> list[fx.Node]:
    if node.op == "placeholder":
        return [node]
    return [found for source in node.all_input_nodes for found in _open_sizes(source)]


def _sizes_of(value: Tensor) -> set[str]:
    sizes = [size_of(int(number)) for number in (*value.shape, *value.stride())]
    return {
        *(BATCH_SIZE for size in sizes if size.batch_power),
        *(NUM_TOKENS for size in sizes if size.tokens_power),
    }


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    module = getattr(target, "__module__", None)
    return f"{module}.{getattr(target, '__qualname__', None) or target}"


def _word(node: fx.Node) -> str:
    target = node.target
    word = target if isinstance(target, str) else str(getattr(target, "__name__", "node"))
    return word.strip("_")


_LOCK: Final = threading.RLock()
# By key: each layer of a model has the same parts, and so has each of its programs.
_GRAPHS: Final[dict[str, fx.GraphModule]] = {}
