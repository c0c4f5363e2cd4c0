"""Pieces: the pure parts of a program, each compiled once for all layers, caches and lengths.

Between two ops of ours a program is plain torch: a piece. It takes tensors and sizes and returns
tensors, and sees no state, no stream, no layer number and no capacity. So the pieces of equal
layers are equal, and a model of 80 layers has as many different ones as a model of four.

    key        what tells it apart (`graph/pure_part.py`)
    compile    once for each key (`compiled_piece.py`)

What an op of ours runs on a side stream is a piece, too (`graph/side_piece.py`).

Compiled pieces belong to the process, as Inductor's own do. Weights are inputs, so models of one
shape share them.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Final

from sparda_compile.graph.effects import argument
from sparda_compile.graph.nodes import fake_value
from sparda_compile.graph.pure_part import PurePart, cut_out
from sparda_compile.graph.side_piece import side_piece_of
from sparda_compile.program.compiled_piece import CompiledPiece

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, fx

__all__ = ["Piece", "compiled_pieces", "make_piece", "piece_of_op"]


@dataclasses.dataclass(frozen=True)
class Piece(PurePart):
    """A pure part of a program, which can be compiled."""

    @property
    def name(self) -> str:
        """A short name, the same for equal pieces."""
        return f"piece_{self.key[:8]}"

    def compile(self, lowering: str) -> None:
        """Compile now, not when first called."""
        function = self.callable(lowering)
        if isinstance(function, CompiledPiece):
            function.compile()

    def callable(self, lowering: str) -> Callable[..., Sequence[Tensor]]:
        """Return a function of the open sizes and the inputs.

        Args:
            lowering: `inductor` or `eager`.
        """
        if lowering == "eager":
            forward: Callable[..., Sequence[Tensor]] = self.graph_module.forward
            return forward
        with _LOCK:
            if self.key not in _COMPILED:
                values = tuple(fake_value(node) for node in self.inputs)
                compiled = CompiledPiece(self.name, self.graph_module, self.sizes, values)
                _COMPILED[self.key] = compiled
            return _COMPILED[self.key]


def make_piece(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Piece:
    """Return the piece of consecutive nodes of a program.

    Args:
        nodes: In order.
        outputs: Those of them that the rest of the program takes.

    Raises:
        PassError: If they change a tensor in place that they have not made.
    """
    part = cut_out(nodes, outputs)
    return Piece(part.key, part.graph_module, part.sizes, part.inputs, part.outputs)


def piece_of_op(node: fx.Node) -> Piece:
    """Return the piece that a `run_piece` runs: it takes the op's result last, and writes it."""
    side = side_piece_of(node)
    inputs = (*argument(node, "inputs"), node)
    return Piece(side.key, side.graph_module, side.sizes, inputs, ())


_LOCK: Final = threading.RLock()
# By key: each layer of a model has the same pieces, and so has each of its programs.
_COMPILED: Final[dict[str, CompiledPiece]] = {}


def compiled_pieces() -> dict[str, CompiledPiece]:
    """Return the pieces that this process has compiled or is about to, by key."""
    return dict(_COMPILED)
