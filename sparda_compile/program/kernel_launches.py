"""Which kernels a program launches, found without running it.

An op of this library runs on fake tensors like any function; only its launches are kept from the
GPU (`kernels/gpu/launch.py`). So the kernels of a decode are compiled while the prompt is still
being read, and those of a prompt in threads while its pieces are compiled.

An op that asks a tensor for a number, as a selector without a kernel may, cannot go on there. What
it launches behind that is compiled where it is launched, and what it returns is what it declares.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparda_compile.graph.effects import instruction
from sparda_compile.graph.emit import fake_arguments
from sparda_compile.graph.fake_runner import FakeRunner, freeze, map_leaves
from sparda_compile.graph.nodes import call_name, fake_value, is_sparda
from sparda_compile.graph.writer import MAY_HIDE, NUM_PAST
from sparda_compile.isa.define import implementation
from sparda_compile.isa.engines import ImmediateEngine, use_engine
from sparda_compile.kernels.gpu.launch import collect_launches
from sparda_compile.sizes import BATCH_SIZE, NUM_TOKENS, concrete

if TYPE_CHECKING:
    from torch import fx

    from sparda_compile.kernels.gpu.launch import Launch

__all__ = ["launches_of"]

_log = logging.getLogger(__name__)


def launches_of(
    graph: fx.Graph,
    device: torch.device,
    batch_size: int,
    num_tokens: int = 1,
    num_past: int = 0,
) -> list[Launch]:
    """Return the launches of one step, in order; of those that launch one kernel the first.

    Args:
        graph: Of a program.
        device: A GPU.
        batch_size: Sequences.
        num_tokens: T, columns of a prompt; 1 for a decode.
        num_past: Most tokens that a sequence of the cache has; no launch of a decode hangs on it.
    """
    # No kernel of ours is launched for padding alone.
    sizes = {BATCH_SIZE: batch_size, NUM_TOKENS: num_tokens, NUM_PAST: num_past, MAY_HIDE: False}
    return _Run(graph, sizes, device).launches()


class _Run:
    """A step on fake tensors of the sizes that it will have; the model's nodes have theirs."""

    def __init__(self, graph: fx.Graph, sizes: dict[str, int], device: torch.device) -> None:
        self._graph = graph
        self._sizes = sizes
        self._device = device
        values = (fake_value(node) for node in graph.nodes if node.op == "placeholder")
        self._runner = FakeRunner.of(
            next(v.fake_mode for v in values if isinstance(v, Tensor))  # type: ignore[attr-defined]
        )
        # How an op is split hangs on the batch, so what ops return is computed here.
        self._results: dict[fx.Node, Any] = {}
        self._seen: dict[Any, Any] = {}

    def launches(self) -> list[Launch]:
        """Run all ops."""
        found: dict[Any, Launch] = {}
        for node in filter(is_sparda, self._graph.nodes):
            for launch in self._run(node):
                found.setdefault((id(launch.kernel), launch.form), launch)
            for user in node.users:
                if call_name(user) == "getitem":
                    self._results[user] = self._results[node][user.args[1]]
        return list(found.values())

    def _run(self, node: fx.Node) -> list[Launch]:
        args, kwargs = fake_arguments(node, self._value)
        parts: list[Any] = [node.target]
        freeze((args, kwargs), parts, [])
        key = tuple(parts)
        launches: list[Launch] = []
        if key not in self._seen:
            it = instruction(node)
            # What ranks do together launches no kernel of ours, and is not done on fake tensors.
            is_collective = it is not None and it.is_collective
            function: Any = node.target if is_collective else implementation(node.target)
            with (
                collect_launches() as launches,
                use_engine(ImmediateEngine()),
                self._runner.fake_mode,
                torch.no_grad(),
            ):
                try:
                    self._seen[key] = function(*args, **kwargs)
                except Exception:  # noqa: BLE001 - the op may be from outside of this package
                    _log.debug("%s does not run on fake tensors", node.target, exc_info=True)
                    self._seen[key] = node.target(*args, **kwargs)  # type: ignore[operator]
        self._results[node] = self._seen[key]
        return launches

    def _value(self, node: fx.Node) -> Any:
        if node.name in self._sizes and node.op == "placeholder":
            return self._sizes[node.name]
        return (
            self._results[node]
            if node in self._results
            else map_leaves(fake_value(node), self._real)
        )

    def _real(self, leaf: Any) -> Any:
        open_sizes = self._sizes[BATCH_SIZE], self._sizes[NUM_TOKENS]
        if type(leaf) is int:  # a number that is made of sizes
            return concrete((leaf,), *open_sizes)[0]
        if not isinstance(leaf, Tensor):
            return leaf
        shape, stride = (concrete(n, *open_sizes) for n in (leaf.shape, leaf.stride()))
        return self._runner.new(shape, stride, leaf.dtype, self._device)
