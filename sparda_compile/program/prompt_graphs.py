"""Short prompts are replayed: to launch their kernels may take longer than to run them.

    B x T columns  -> T up to the next multiple of 64, hidden columns at the left
    past           -> up to the next power of two, at most what the cache has room for
    both           -> a shape: read as it is at first, captured the second time, then replayed

Sizes of prompts are rounded so that few shapes come. They are rounded whether or not a graph is
captured, so a prompt has the same bits either way. Hidden columns and a past that nobody has are
skipped by the kernels: 63 more columns at most. A long prompt keeps the GPU busy by itself, and its
graph would hold its memory: it is not rounded.
"""

from __future__ import annotations

import collections
import weakref
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.program.step_graph import StepGraph

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sparda_compile.runtime.kv_cache import KVCache

__all__ = [
    "MOST_BYTES",
    "PromptGraphs",
    "is_short",
    "longest_short",
    "num_read",
    "rounded_past",
]

# Columns of all sequences that a short prompt has at most, and what its columns are a multiple of.
_MOST_COLUMNS: Final = 4096
_STEP: Final = 64
# Shapes that are known of a cache, and so the most graphs; those used last.
_MOST_SHAPES: Final = 16
# Bytes that a graph may hold, which all graphs of a program share. The time that a GPU works grows
# with them: 1024 tokens of the 8b shape take 0.10 GiB by `prompt_memory`, and kept an H200 busy for
# 0.39 of their 48 ms (benchmarks/results/2026-11-30-h200-prefill-1024.json).
MOST_BYTES: Final = 1 << 28


def is_short(batch_size: int, num_columns: int, device: torch.device) -> bool:
    """Return whether a prompt of so many columns is one whose shape is rounded."""
    return device.type == "cuda" and batch_size * num_columns <= _MOST_COLUMNS


def longest_short(batch_size: int) -> int:
    """Return how many columns the longest short prompt of so many sequences has; 0 for none."""
    return _MOST_COLUMNS // batch_size // _STEP * _STEP


def num_read(batch_size: int, num_columns: int, device: torch.device) -> int:
    """Return how many columns are read for so many: two or more, the hidden ones counted."""
    if is_short(batch_size, num_columns, device):
        return -(-num_columns // _STEP) * _STEP
    return max(num_columns, 2)


def rounded_past(num_past: int, most: int) -> int:
    """Return up to how many tokens a short prompt's past is said to have.

    Args:
        num_past: No sequence has more.
        most: Tokens that the cache has room for.
    """
    return min(1 << (num_past - 1).bit_length(), most) if num_past else 0


# A shape that was read once.
_NOT_YET: Final = object()


class PromptGraphs:
    """The CUDA graphs of a program for prompts; a graph holds addresses, so they are by cache.

    Args:
        function: Takes what `bind` returned, returns the logits. May change them in place.
        failed_in: As for `graph_capture.capture`.
    """

    def __init__(self, function: Callable[..., Tensor], failed_in: Callable[[], str] = str) -> None:
        self._function = function
        self._failed_in = failed_in
        self._graphs: weakref.WeakKeyDictionary[
            KVCache, collections.OrderedDict[tuple[Any, ...], Any]
        ] = weakref.WeakKeyDictionary()
        self._pool: Any = None

    def __len__(self) -> int:
        """Graphs that were captured and are alive."""
        every = [each for kept in self._graphs.values() for each in kept.values()]
        return sum(isinstance(each, StepGraph) and each.is_captured for each in every)

    def run(
        self,
        kv: KVCache,
        inputs: Sequence[Tensor],
        sizes: tuple[Any, ...],
        bind: Callable[..., Sequence[Any]],
        fits: Callable[[], bool],
    ) -> Tensor:
        """Read a prompt: at first as it is, then by a graph.

        Args:
            kv: The cache.
            inputs: What differs from call to call.
            sizes: All else that the calls depend on and that is not a tensor.
            bind: Returns the function's arguments for tensors in the place of `inputs`.
            fits: Whether a graph may hold what the prompt takes; asked before one is captured.

        Raises:
            CudaGraphError: If the function does what a CUDA graph cannot hold.
        """
        kept = self._graphs.setdefault(kv, collections.OrderedDict())
        key = (*(tuple(each.shape) for each in inputs), *sizes)
        if key not in kept:
            if len(kept) == _MOST_SHAPES:
                kept.popitem(last=False)
            kept[key] = _NOT_YET
            return self._function(*bind(*inputs))
        if kept[key] is _NOT_YET:
            kept[key] = self._graph(inputs, bind) if fits() else None
        kept.move_to_end(key)
        graph = kept[key]
        if graph is None:
            return self._function(*bind(*inputs))
        try:
            logits: Tensor = graph(*inputs)
        finally:
            if not graph.is_captured:
                kept[key] = _NOT_YET
        return logits

    def _graph(self, inputs: Sequence[Tensor], bind: Callable[..., Sequence[Any]]) -> StepGraph:
        if not len(self):
            # Nobody may add to a pool that all graphs have left.
            self._pool = torch.cuda.graph_pool_handle()
        buffers = [each.clone() for each in inputs]
        known = {"pool": self._pool, "has_run": True, "failed_in": self._failed_in}
        return StepGraph(self._function, bind(*buffers), buffers, **known)
