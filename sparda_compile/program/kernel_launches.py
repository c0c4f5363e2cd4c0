"""Which kernels a program of a decode step launches, found without running it.

An op of this library runs on fake tensors like any function; only its launches are kept from the
GPU (`kernels/gpu/launch.py`). So its kernels are compiled while the prompt is still being read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparda_compile.graph.emit import fake_arguments
from sparda_compile.graph.fake_runner import FakeRunner, freeze, map_leaves
from sparda_compile.graph.nodes import call_name, fake_value, is_sparda
from sparda_compile.isa.define import implementation
from sparda_compile.isa.engines import ImmediateEngine, use_engine
from sparda_compile.kernels.gpu.launch import collect_launches
from sparda_compile.sizes import concrete

if TYPE_CHECKING:
    from torch import fx

    from sparda_compile.kernels.gpu.launch import Launch

__all__ = ["launches_of"]


def launches_of(graph: fx.Graph, batch_size: int, device: torch.device) -> list[Launch]:
    """Return the launches of one decode step; of equal ones the first.

    Args:
        graph: Of a decode.
        batch_size: Sequences.
        device: A GPU.
    """
    return _Run(graph, batch_size, device).launches()


class _Run:
    """A step on fake tensors of the sizes that it will have; the model's nodes have theirs."""

    def __init__(self, graph: fx.Graph, batch_size: int, device: torch.device) -> None:
        self._graph = graph
        self._batch_size = batch_size
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
            found |= {_key(launch): launch for launch in self._run(node)}
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
            function = implementation(node.target)
            with (
                collect_launches() as launches,
                use_engine(ImmediateEngine()),
                self._runner.fake_mode,
                torch.no_grad(),
            ):
                self._seen[key] = function(*args, **kwargs)
        self._results[node] = self._seen[key]
        return launches

    def _value(self, node: fx.Node) -> Any:
        return (
            self._results[node]
            if node in self._results
            else map_leaves(fake_value(node), self._real)
        )

    def _real(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        sizes = (leaf.shape, leaf.stride())
        shape, stride = (concrete(numbers, self._batch_size, 1) for numbers in sizes)
        return self._runner.new(shape, stride, leaf.dtype, self._device)


def _key(launch: Launch) -> tuple[Any, ...]:
    parts: list[Any] = [launch.kernel]
    freeze((launch.args, launch.options), parts, [])
    return tuple(parts)
