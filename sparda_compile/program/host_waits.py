"""Ops of a model that wait for the CPU while they run: no CUDA graph can hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from torch._ops import OpOverload, OpOverloadPacket

from sparda_compile.errors import UnsupportedInputError

if TYPE_CHECKING:
    from torch import fx

__all__ = ["check_no_host_waits"]

# By name: why an op waits, and what to do about it.
_WAITS: Final = {
    "transformers::grouped_mm_fallback": (
        "transformers multiplies by one expert after the other in every dtype but bfloat16, and "
        "asks the GPU each time how many tokens an expert has",
        "Load the model in bfloat16, or call model.set_experts_implementation('batched_mm') before "
        "optimize",
    ),
}


def check_no_host_waits(graph: fx.Graph) -> None:
    """Refuse a graph that is to be captured in a CUDA graph and waits for the CPU.

    Raises:
        UnsupportedInputError: If it has an op that is known to wait; says what to do.
    """
    for node in graph.nodes:
        name = _name(node)
        if name in _WAITS:
            why, instead = _WAITS[name]
            raise UnsupportedInputError(
                f"{name} waits for the CPU, and a CUDA graph of a step cannot hold it: {why}. "
                f"{instead}; or pass cuda_graph=False, with which each step is launched from the "
                "CPU and is slower."
            )


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, OpOverload):
        return target._schema.name
    return target._qualified_op_name if isinstance(target, OpOverloadPacket) else ""
