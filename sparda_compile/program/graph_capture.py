"""Captures a function in a CUDA graph; where that fails, says why and leaves the GPU as it was.

torch leaves a capture that has failed half open. So here

    current stream     is the one before again; torch leaves the one that captures
    memory             the pool takes no more and is given back; the error's frames hold no tensor
    random numbers     a generator that still counts for the graph goes on in a state of its own

Nothing of a graph that failed has run: launches are only noted while it is captured.
"""

from __future__ import annotations

import contextlib
import traceback
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.errors import CudaGraphError, SpardaError
from sparda_compile.graph.nodes import call_name, module_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, fx

    from sparda_compile.program.lower import Call
    from sparda_compile.program.pieces import Piece

__all__ = ["capture", "place_of"]

# What says itself what is to be done.
_CLEAR: Final = (SpardaError, torch.OutOfMemoryError)


class _First:
    """Notes the first error: torch raises another one when it ends a capture that has failed."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __enter__(self) -> None:
        """Watch the block."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Note what it raises."""
        self.error = self.error or error


def capture(
    function: Callable[[], Tensor], pool: Any, failed_in: Callable[[], str]
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return a CUDA graph of what a function launches, and what the function returned.

    Args:
        function: Runs on the current device; its work is noted and not done.
        pool: A handle of the memory that the graph is to share; None is memory of its own.
        failed_in: Called once if the capture fails, when it has ended: says where, a sentence.

    Raises:
        CudaGraphError: If the function does what a graph cannot hold. Errors of this library, and
            one that says that there is no memory, are raised as they are.
    """
    torch.cuda.synchronize()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    graph, stream, first = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), _First()
    capturing = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
    with contextlib.suppress(BaseException), first, capturing, first:
        logits = function()
    error = first.error
    if error is None:
        return graph, logits
    del graph, capturing  # they may have ended well, and the error knows this frame
    _leave(stream, pool)
    where = failed_in()
    _forget_frames(error)
    if isinstance(error, _CLEAR) or not isinstance(error, Exception):
        raise error
    raise CudaGraphError(_sentence(error, where)) from error


def _leave(stream: torch.cuda.Stream, pool: Any) -> None:
    """Undo what torch has left of a capture that failed."""
    torch.cuda.set_stream(stream)
    index = stream.device.index
    # torch gives back the pool of a graph that it has made, and says so by having ended this.
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    generator = torch.cuda.default_generators[index]
    state = generator.get_state()
    try:
        torch.empty(1, device=stream.device).uniform_(generator=generator)
        generator.set_state(state)
    except RuntimeError:
        # It still counts for the graph, and there is no way to tell it that the graph has failed.
        generator.graphsafe_set_state(generator.clone_state())


def _forget_frames(error: BaseException | None) -> None:
    """Let the frames that an error was raised in go of their tensors: they are in the pool."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _sentence(error: Exception, where: str) -> str:
    kind = type(error).__name__
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    reason = f"{kind}: {said}".rstrip(": .")
    return (
        f"no CUDA graph could be captured{where}. torch says: {reason}. A graph holds work of the "
        "GPU alone: while it is captured, nothing may wait for the GPU, as .item(), .cpu(), "
        "nonzero and a mask as an index do, read CPU memory that is not pinned, or use a stream "
        "that does not wait for the current one. Change what does so, or pass cuda_graph=False, "
        "with which each step is launched from the CPU and is slower."
    )


def place_of(call: Call | None) -> str:
    """Return where a call of a program comes from, as the end of a clause; empty for no call."""
    if call is None:
        return ""
    if call.node is not None:
        return f", in {call.name}, {_of_model(call.node)}"
    assert call.piece is not None
    nodes = _nodes_of(call.piece)
    # What torch defines is in every piece; ops of other packages are few, and what to look at.
    foreign = [node for node in nodes if "." in call_name(node)]
    if foreign:
        return f", in {call.name}, which calls {'; '.join(map(_of_model, foreign))}"
    return f", in {call.name}, from {_of_model(nodes[0])} to {_of_model(nodes[-1])}"


def _of_model(node: fx.Node) -> str:
    """Return what a node calls, and the module and the line of the model that it is from."""
    places = [module_path(node), str(node.meta.get("stack_trace", "")).strip()]
    return f"{call_name(node)} ({': '.join(filter(None, places))})"


def _nodes_of(piece: Piece) -> list[fx.Node]:
    """Return the nodes of a program that a piece computes, in order."""
    found: set[fx.Node] = set()
    above = list(piece.outputs)
    while above:
        node = above.pop()
        if node not in found and node not in piece.inputs and node.op != "placeholder":
            found.add(node)
            above += node.all_input_nodes
    return sorted(found)
