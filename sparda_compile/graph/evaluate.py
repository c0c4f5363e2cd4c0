"""Real values of a graph's nodes, on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from sparda_compile.graph.nodes import fake_value
from sparda_compile.sizes import NUM_TOKENS, concrete

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping


__all__ = ["PROOF_BATCH", "NotProvableError", "ancestors", "evaluate", "tensor_value"]


# Sequences, where a graph is for any number of them.
PROOF_BATCH = 2


class NotProvableError(Exception):
    """The nodes read something that a proof cannot give a value."""


def _on_cpu(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def ancestors(target: fx.Node, known: Collection[fx.Node]) -> set[fx.Node]:
    """Return a node and all that it is computed from, but what lies behind known nodes."""
    found: set[fx.Node] = set()
    stack = [target]
    while stack:
        node = stack.pop()
        if node not in found and node not in known:
            found.add(node)
            stack += node.all_input_nodes
    return found


def evaluate(
    target: fx.Node,
    known: Mapping[fx.Node, Any],
    weights: Mapping[str, Tensor],
    num_tokens: int,
    convert: Callable[[Any], Any] = _on_cpu,
) -> Any:
    """Compute a node's real value from values of some of its ancestors.

    Args:
        target: Node to compute.
        known: Values of nodes; nothing above them is computed.
        weights: Values of placeholders, which are taken to the CPU.
        num_tokens: Value of the prompt length; there are `PROOF_BATCH` sequences.
        convert: Gives what stands for an argument that is no node; the CPU for any device.

    Raises:
        NotProvableError: If a weight, or a buffer without a value, is needed.
    """
    needed = ancestors(target, known)
    values: dict[fx.Node, Any] = dict(known)

    def value(arg: Any) -> Any:
        return values[arg] if isinstance(arg, fx.Node) else convert(arg)

    for node in target.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            values[node] = _placeholder(node, weights, num_tokens)
            continue
        args = fx.node.map_aggregate(node.args, value)
        kwargs = fx.node.map_aggregate(node.kwargs, value)
        if node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            values[node] = node.target(*args, **kwargs)
    return values[target]


def _placeholder(node: fx.Node, weights: Mapping[str, Tensor], num_tokens: int) -> Any:
    fake = fake_value(node)
    if not isinstance(fake, Tensor):
        return num_tokens if node.name == NUM_TOKENS else PROOF_BATCH
    if node.name not in weights:
        shape = concrete(fake.shape, PROOF_BATCH, num_tokens)
        return torch.arange(shape[-1]).expand(shape)
    return tensor_value(node, weights)


def tensor_value(node: fx.Node, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor of a placeholder, on the CPU.

    Raises:
        NotProvableError: If it is a weight, or has no value.
    """
    weight = weights[node.name]
    if isinstance(weight, nn.Parameter):
        raise NotProvableError(f"it reads the parameter {node.name}")
    if weight.is_meta:
        raise NotProvableError(f"it reads the buffer {node.name}, which has no values here")
    return weight.cpu()
