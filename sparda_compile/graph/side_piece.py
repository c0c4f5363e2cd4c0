"""Side pieces: pure parts that an op of ours runs on any stream, `run_piece`.

    part         result = rotation(linear(hidden, weight))
    side piece   result_out.copy_(rotation(linear(hidden, weight)))

A side stream's work is issued before it is done, so the op makes its result first, and the piece
writes it. The op names the piece; the process knows it by that name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.errors import PassError
from sparda_compile.graph.effects import argument
from sparda_compile.graph.nodes import as_module, copy_graph, fake_value

if TYPE_CHECKING:
    from torch import fx

    from sparda_compile.graph.pure_part import PurePart

__all__ = ["SidePiece", "add_side_piece", "side_piece", "side_piece_of"]


@dataclasses.dataclass(frozen=True)
class SidePiece:
    """A part of one result, in the form that writes it.

    Attributes:
        key: As of the part, and another than the part's.
        graph_module: Takes the open sizes, the tensors, then the result, which it writes.
        sizes: `batch_size`, if it takes that.
        dtype: Of the result.
    """

    key: str
    graph_module: fx.GraphModule
    sizes: tuple[str, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """What ops know it by."""
        return _name(self.key)


def add_side_piece(part: PurePart) -> SidePiece:
    """Return the side piece of a part of one result, known from now on."""
    (output,) = part.outputs
    key = hashlib.sha256(f"{part.key}, written".encode()).hexdigest()
    name = _name(key)
    with _LOCK:
        if name not in _KNOWN:
            dtype = fake_value(output).dtype
            _KNOWN[name] = SidePiece(key, _written(part), part.sizes, dtype)
        return _KNOWN[name]


def side_piece(name: str) -> SidePiece:
    """Return a side piece by its name.

    Raises:
        PassError: If this process has made none of that name.
    """
    if name not in _KNOWN:
        raise PassError(
            f"{name!r} names no piece of this process; a graph that names one runs in the process "
            "that has made it. Plan it again."
        )
    return _KNOWN[name]


def side_piece_of(node: fx.Node) -> SidePiece:
    """Return the side piece that a `run_piece` runs."""
    return side_piece(argument(node, "piece"))


def _name(key: str) -> str:
    return f"piece_{key[:16]}"


def _written(part: PurePart) -> fx.GraphModule:
    """Return a part's graph with one more input, which takes what it returned."""
    graph = copy_graph(part.graph_module.graph)
    end = next(iter(reversed(graph.nodes)))
    (value,) = end.args[0]
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        result = graph.placeholder("result")
    result.meta["val"] = value.meta["val"]
    with graph.inserting_before(end):
        # As a function: what looks for dead code knows that it writes.
        copied = graph.call_function(torch.ops.aten.copy_.default, (result, value))
    copied.meta["val"] = value.meta["val"]
    end.args = ((),)
    end.meta["val"] = ()
    return as_module(graph)


_LOCK: Final = threading.Lock()
_KNOWN: Final[dict[str, SidePiece]] = {}
