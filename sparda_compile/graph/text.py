"""A graph as text: one line per node."""

from __future__ import annotations

from torch import fx

from sparda_compile.sizes import size_text

__all__ = ["graph_text"]


def graph_text(graph: fx.Graph) -> str:
    """Return a graph as text: one line per node, placeholders of weights left out."""
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder" and not node.users:
            continue
        lines.append(_line(node))
    return "\n".join(lines)


def _line(node: fx.Node) -> str:
    from sparda_compile.graph.nodes import call_name, fake_value

    value = fake_value(node)
    shape = f": {_shape(value)}" if hasattr(value, "shape") else ""
    if node.op == "placeholder":
        return f"%{node.name}{shape} = input"
    if node.op == "output":
        return f"return {node.args[0]}"
    arguments = [_text(a) for a in node.args]
    arguments += [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    return f"%{node.name}{shape} = {call_name(node)}({', '.join(arguments)})"


def _shape(value: object) -> str:
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return f"{dtype}[{', '.join(size_text(s) for s in getattr(value, 'shape', ()))}]"


def _text(argument: object) -> str:
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(_text(a) for a in argument)}]"
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop)
        return ":".join("" if p is None else _text(p) for p in parts)
    return "..." if argument is Ellipsis else str(argument)
