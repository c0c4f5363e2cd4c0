"""Where an attention ends: the node of its output, and what that takes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from sparda_compile.graph.evaluate import evaluate
from sparda_compile.graph.nodes import call_name, fake_value, tensor_shape
from sparda_compile.passes.find.attention_proof import measure_scale
from sparda_compile.passes.find.dataflow import LINEAR, MATMUL, Dataflow, RefusedAttentionError

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = [
    "Anchor",
    "marker_of",
    "match_anchor",
    "operand_chain",
    "scale_of",
    "softcap_of",
    "unrepeated",
    "why_unmatched",
]


_SDPA: Final = "scaled_dot_product_attention"


# A walk back from an anchor stops at these: what lies behind them is another computation.
_STOPS: Final = frozenset({*MATMUL, *LINEAR, "embedding", "cat", "softmax", "sparda.kv_update"})


@dataclasses.dataclass(frozen=True)
class Anchor:
    """An attention output and its operands; `path` are the nodes from Q K^T to the softmax."""

    node: fx.Node
    form: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    path: tuple[fx.Node, ...] = ()


def match_anchor(node: fx.Node, flow: Dataflow) -> Anchor | None:
    """Return the attention that ends in a node, None if none does."""
    if node.op not in ("call_function", "call_method"):
        return None
    if call_name(node) == _SDPA:
        named = dict(zip(("query", "key", "value"), node.args, strict=False)) | node.kwargs
        query, key, value = (named[n] for n in ("query", "key", "value"))
        assert isinstance(query, fx.Node)
        assert isinstance(key, fx.Node)
        assert isinstance(value, fx.Node)
        return Anchor(node, "sdpa", query, key, value)
    if call_name(node) not in MATMUL or len(node.all_input_nodes) != 2:
        return None
    weights, value = node.all_input_nodes
    softmax = _walk_back(weights, "softmax", flow)
    if softmax is None:
        return None
    scores = _walk_back(softmax[-1].all_input_nodes[0], "matmul", flow)
    if scores is None or len(scores[-1].all_input_nodes) != 2:
        return None
    query, key = scores[-1].all_input_nodes
    return Anchor(node, "eager", query, key, value, tuple(scores))


def _walk_back(start: fx.Node, wanted: str, flow: Dataflow) -> list[fx.Node] | None:
    """Follow what depends on the input back to a call of `wanted`; None if there is none."""
    path = [start]
    while call_name(path[-1]) != wanted:
        if call_name(path[-1]) in _STOPS or path[-1].op == "placeholder":
            return None
        inputs = [n for n in path[-1].all_input_nodes if n in flow.active]
        if len(inputs) != 1:
            return None
        path.append(inputs[0])
    return path


def operand_chain(node: fx.Node) -> list[fx.Node]:
    """Return a key or value operand and what it was repeated or transposed from."""
    chain = [node]
    while chain[-1].op != "placeholder" and call_name(chain[-1]) not in _STOPS:
        if not chain[-1].all_input_nodes:
            break
        chain.append(chain[-1].all_input_nodes[0])
    return chain


def marker_of(anchor: Anchor) -> fx.Node | None:
    """Return the `kv_update` that an attention's keys come from, None if there is none."""
    last = operand_chain(anchor.key)[-1]
    return last if call_name(last) == "sparda.kv_update" else None


def unrepeated(operand: fx.Node, num_heads: Any) -> fx.Node:
    """Return the [B, G, T, D] tensor that an operand with H heads repeats, or the operand."""
    repeats = {"repeat_interleave", "repeat", "expand", "reshape", "view", "contiguous"}
    repeats |= {"getitem", "flatten", "unsqueeze"}
    node = candidate = operand
    if tensor_shape(operand)[1] != num_heads:
        return operand
    while call_name(node) in repeats and node.all_input_nodes:
        node = node.all_input_nodes[0]
        shape = tensor_shape(node)
        fits = len(shape) == 4 and shape[3] == tensor_shape(candidate)[3]
        if fits and isinstance(shape[1], int) and shape[1] < num_heads:
            candidate = node
    return candidate


def softcap_of(anchor: Anchor, weights: Mapping[str, Tensor]) -> float:
    """Return the cap of scores = cap * tanh(x / cap), 0.0 when there is no tanh."""
    for i, node in enumerate(anchor.path):
        if call_name(node) == "tanh" and i > 0:
            one = evaluate(anchor.path[i - 1], {node: torch.ones(1, 1, 1, 1)}, weights, 1)
            return float(one.flatten()[0])
    return 0.0


def scale_of(
    anchor: Anchor,
    k: fx.Node,
    known_kv: Mapping[fx.Node, fx.Node],
    softcap: float,
    weights: Mapping[str, Tensor],
) -> float:
    """Return the factor on q . k, which is measured where it is not given."""
    if anchor.form == "sdpa":
        given = anchor.node.kwargs.get("scale")
        return float(given) if isinstance(given, (int, float)) else fake_value(k).shape[3] ** -0.5
    before_cap = anchor.path[0]
    for i, node in enumerate(anchor.path):
        if call_name(node) == "tanh":
            before_cap = anchor.path[i + 1]
    try:
        factor = measure_scale(before_cap, anchor.query, k, known_kv, weights)
    except Exception as error:  # noqa: BLE001 - whatever fails here, the site is not understood
        raise RefusedAttentionError(f"its scores cannot be computed alone ({error})") from None
    return factor * softcap if softcap else factor


def why_unmatched(marker: fx.Node) -> str:
    """Say what the keys of an unmatched marker run into first."""
    stack, seen = list(marker.users), set()
    names = []
    while stack:
        node = stack.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if call_name(node) in (*_STOPS, _SDPA):
            names.append(call_name(node))
            if call_name(node) not in MATMUL or len(names) > 3:
                continue
        stack += list(node.users)
        if len(seen) > 200:
            break
    path = " -> ".join(dict.fromkeys(names[:4])) or "nothing that is known"
    return (
        f"its keys do not lead to softmax(Q K^T) V but to {path}, as with attention sinks, "
        "ALiBi biases or a latent cache"
    )
