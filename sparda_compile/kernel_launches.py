"""Which kernels a program of a decode step launches, found without running it.

An op of this library runs on fake tensors like any function; only its launches are kept from the
GPU (`kernels/gpu/launch.py`). So its kernels are compiled while the prompt is still being read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparda_compile.fake_runner import FakeRunner, freeze, leaves_of, map_leaves
from sparda_compile.kernels.gpu.launch import collect_launches
from sparda_compile.ops import INSTRUCTIONS, implementation
from sparda_compile.passes.fx import fake_arguments, fake_value, find_ops
from sparda_compile.sizes import concrete
from sparda_compile.streams import ImmediateEngine, use_engine

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
    ops = find_ops(graph, *INSTRUCTIONS)
    values = [v for node in ops for v in leaves_of(fake_value(node)) if isinstance(v, Tensor)]
    runner = FakeRunner.of(values[0].fake_mode)  # type: ignore[attr-defined]

    def real(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shape, stride = (concrete(sizes, batch_size, 1) for sizes in (leaf.shape, leaf.stride()))
        return runner.new(shape, stride, leaf.dtype, device)

    seen: set[Any] = set()
    found: dict[Any, Launch] = {}
    for node in ops:
        args, kwargs = map_leaves(fake_arguments(node), real)
        parts: list[Any] = [node.target]
        if not freeze((args, kwargs), parts, []) or tuple(parts) in seen:
            continue
        seen.add(tuple(parts))
        function = implementation(node.target, "cuda")
        with (
            collect_launches() as launches,
            use_engine(ImmediateEngine()),
            runner.fake_mode,
            torch.no_grad(),
        ):
            function(*args, **kwargs)
        found |= {_key(launch): launch for launch in launches}
    return list(found.values())


def _key(launch: Launch) -> tuple[Any, ...]:
    parts: list[Any] = [launch.kernel]
    freeze((launch.args, launch.options), parts, [])
    return tuple(parts)
