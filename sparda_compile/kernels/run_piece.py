"""Run a piece of the model on any stream: `graph/side_piece.py` says what that is.

The result is made on the compute stream, as those of all ops are, and the piece writes it. What the
piece computes on its way is memory of the stream that it runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sparda_compile.graph.side_piece import side_piece
from sparda_compile.isa.define import define
from sparda_compile.isa.engines import current_engine
from sparda_compile.isa.streams import COMPUTE
from sparda_compile.isa.table import Work

__all__ = ["run_piece", "running"]


def _result(inputs: Sequence[Tensor], shape: Sequence[int], piece: str) -> Tensor:
    return inputs[0].new_empty(shape, dtype=side_piece(piece).dtype)


def running(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return what takes the arguments of `run_piece` and runs a compiled form of its piece.

    Args:
        function: Takes the open sizes, the inputs and the result, which it writes.
    """

    def run(
        inputs: Sequence[Tensor],
        sizes: Sequence[int],
        shape: Sequence[int],
        piece: str,
        stream: int = COMPUTE,
        after: Tensor | None = None,
    ) -> Tensor:
        del after
        result = _result(inputs, shape, piece)
        current_engine().submit(stream, lambda: function(*sizes, *inputs, result))
        return result

    return run


@define(fake=lambda a: _result(a.inputs, a.shape, a.piece), work=Work.PIECE, is_free=True)
def run_piece(
    inputs: Sequence[Tensor],
    sizes: Sequence[int],
    shape: Sequence[int],
    piece: str,
    stream: int = COMPUTE,
    after: Tensor | None = None,
) -> Tensor:
    """Run a piece of the model, such as a Forecast's projection and rotation.

    Args:
        inputs: What the piece takes, of any shapes and dtypes.
        sizes: The open sizes that it takes: the number of sequences, or nothing.
        shape: Of the result.
        piece: Its name.
        stream: 0 compute, 2 select.
        after: Result of the fork that starts the select stream's work, if this op is first on it.

    Returns:
        What the piece computes, contiguous, of its dtype.

    Raises:
        PassError: If this process knows no piece of that name.
    """
    run = running(side_piece(piece).graph_module)
    return run(inputs, sizes, shape, piece, stream, after)
