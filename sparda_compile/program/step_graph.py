"""One CUDA graph of a whole decode step, copy branch included, over the compiled program.

A short prompt has one, too, see `prompt_graphs.py`.

    first token      the program runs as it is: kernels are compiled, nothing is recorded
    second token     the program is captured: every launch on every stream, every event, no work
    from then on     inputs are copied into the captured buffers, and the graph is replayed

A graph holds addresses, so there is one for each cache that a program runs on. What the program
does in Python happens only while it is captured. Where that fails, the next call tries again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparda_compile.program.graph_capture import capture

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

__all__ = ["StepGraph"]


class StepGraph:
    """A function of fixed tensors, captured at its second call.

    Args:
        function: Takes `arguments`, returns the logits. May change them in place.
        arguments: What it is called with, always.
        inputs: Those of the arguments whose values change from call to call.
        pool: A handle of the memory that the graph is to share with others, of which no two are
            replayed at once; None is memory of its own.
        has_run: Whether the function has run with arguments of these sizes: no first call is
            needed then.
        failed_in: As for `capture`.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        arguments: Sequence[Any],
        inputs: Sequence[Tensor],
        *,
        pool: Any = None,
        has_run: bool = False,
        failed_in: Callable[[], str] = str,
    ) -> None:
        self._function = function
        self._arguments = tuple(arguments)
        self._inputs = tuple(inputs)
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._has_run = has_run
        self._failed_in = failed_in

    @property
    def is_captured(self) -> bool:
        """Whether calls replay a graph."""
        return self._graph is not None

    def __call__(self, *values: Tensor) -> Tensor:
        """Run one step with new values of the inputs; returns the logits, a tensor of their own.

        Raises:
            CudaGraphError: If the function does what a CUDA graph cannot hold.
        """
        for buffer, value in zip(self._inputs, values, strict=True):
            buffer.copy_(value)
        if not self._has_run:
            self._has_run = True
            return self._function(*self._arguments)
        if self._graph is None:
            self._graph, self._logits = capture(
                lambda: self._function(*self._arguments), self._pool, self._failed_in
            )
        assert self._logits is not None
        self._graph.replay()
        return self._logits.clone()
