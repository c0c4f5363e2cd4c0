"""Proof by evaluation: a site is rewritten only if its nodes compute what the rewrite will.

The nodes between (query, new keys, new values) and the attention output, with every mask they
read, are run on random numbers and compared with plain causal attention. This one check covers
scale, soft cap, head grouping, sinks and biases: whatever the graph does with a few tokens, it must
agree. What a mask is at longer distances, `mask_proof.py` proves.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from sparda_compile.graph.evaluate import PROOF_BATCH, NotProvableError, evaluate
from sparda_compile.graph.nodes import fake_value, nodes_between
from sparda_compile.sizes import concrete

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ends_in_one", "find_difference", "measure_scale", "reference_attention"]

# A shape and a dtype.
_Shaped: TypeAlias = tuple[tuple[int, ...], torch.dtype]
_PROOF_TOKENS = 24
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, window: int
) -> Tensor:
    """Plain causal attention of T tokens over themselves, in fp64.

    Args:
        q: [B, H, T, D].
        k: [B, G, T, D]; query head h reads group h // (H / G).
        v: [B, G, T, D].
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        window: Tokens that a query sees, itself included; 0 for all.
    """
    repeat = q.shape[1] // k.shape[1]
    keys = k.double().repeat_interleave(repeat, 1)
    values = v.double().repeat_interleave(repeat, 1)
    scores = q.double() @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    index = torch.arange(q.shape[2])
    seen = index[:, None] >= index
    if window:
        seen &= index[:, None] - index < window
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values


def _random_inputs(
    query: fx.Node, k: fx.Node, v: fx.Node, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, keys, values = (_shaped(node, num_tokens) for node in (query, k, v))
    return _drawn(q, keys, values)


def _shaped(node: fx.Node, num_tokens: int) -> _Shaped:
    fake = fake_value(node)
    return concrete(fake.shape, PROOF_BATCH, num_tokens), fake.dtype


def _drawn(q: _Shaped, keys: _Shaped, values: _Shaped) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return draw(*q), draw(*keys), draw(*values)


@functools.lru_cache(maxsize=4)
def _case(
    q: _Shaped, keys: _Shaped, values: _Shaped, scale: float, softcap: float, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return random inputs and plain attention of them: the layers of a model have few shapes."""
    drawn = _drawn(q, keys, values)
    return *drawn, reference_attention(*drawn, scale=scale, softcap=softcap, window=window)


def measure_scale(
    scores: fx.Node,
    query: fx.Node,
    k: fx.Node,
    known_kv: Mapping[fx.Node, fx.Node],
    weights: Mapping[str, Tensor],
) -> float:
    """Return the factor between q . k and `scores`, measured on one entry that no mask hides."""
    num_tokens = 2
    q, keys, values = _random_inputs(query, k, k, num_tokens)
    known = {query: q, **_substitute(known_kv, {k: keys}, values)}
    got = evaluate(scores, known, weights, num_tokens)[:, :, 0, 0].double()
    repeat = q.shape[1] // keys.shape[1]
    raw = (q[:, :, 0] * keys.repeat_interleave(repeat, 1)[:, :, 0]).double().sum(-1)
    entry = raw.abs().argmax()
    factor = float(got.flatten()[entry] / raw.flatten()[entry])
    usual = float(q.shape[-1] ** -0.5)
    for nice in (usual, 1.0):
        if abs(factor - nice) < 1e-2 * nice * (1 if q.dtype.itemsize == 2 else 1e-3):
            return nice
    return factor


def _substitute(
    known_kv: Mapping[fx.Node, fx.Node], values: Mapping[fx.Node, Tensor], default: Tensor
) -> dict[fx.Node, Tensor]:
    """Give the nodes that stand for cached keys and values the values of the new ones."""
    return {node: values.get(new, default) for node, new in known_kv.items()}


def find_difference(
    anchor: fx.Node,
    query: fx.Node,
    k: fx.Node,
    v: fx.Node,
    known_kv: Mapping[fx.Node, fx.Node],
    weights: Mapping[str, Tensor],
    *,
    scale: float,
    softcap: float,
    window: int,
) -> str:
    """Say how an attention differs from plain causal attention; empty when it does not.

    Args:
        anchor: Node of the attention output.
        query: Node of the query [B, H, T, D].
        k: Node of the new keys [B, G, T, D].
        v: Node of the new values.
        known_kv: Nodes that return cached keys or values -> `k` or `v`.
        weights: Values of placeholders.
        scale: Factor on q . k that the rewrite will use.
        softcap: Soft cap that the rewrite will use.
        window: Sliding window that the rewrite will use.
    """
    is_decode = int(fake_value(query).shape[2]) == 1
    num_tokens = 1 if is_decode else _PROOF_TOKENS
    shaped = (_shaped(node, num_tokens) for node in (query, k, v))
    *inputs, want = _case(*shaped, scale, softcap, window)
    q, keys, values = (tensor.clone() for tensor in inputs)
    known = {query: q, **_substitute(known_kv, {k: keys, v: values}, values)}
    try:
        got = evaluate(anchor, known, weights, num_tokens)
    except NotProvableError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever fails here, the site is not understood
        return f"its nodes cannot be run alone ({type(error).__name__}: {error})"
    if tuple(got.shape) != tuple(want.shape):
        return f"its output has shape {tuple(got.shape)}, not {tuple(want.shape)}"
    difference = float((got.double() - want).abs().max() / want.abs().max())
    if difference < _TOLERANCE.get(q.dtype, 1e-4):
        return ""
    what = f"window {window}" if window else "no window"
    return (
        f"its values are not causal attention with scale {scale:.4g}, soft cap {softcap:.4g} and "
        f"{what} (relative difference {difference:.2g}): another mask, a bias, sinks or another "
        "grouping of heads"
    )


def ends_in_one(query: fx.Node, projection: fx.Node, weights: Mapping[str, Tensor]) -> bool:
    """Whether the last channel of a query is 1 whatever its projection gives.

    Args:
        query: Node of the query [B, H, T, D] of a decode step.
        projection: The linear that makes it.
        weights: Values of placeholders; parameters count as unknown.
    """
    generator = torch.Generator().manual_seed(0)
    region = nodes_between(projection, query)
    known: dict[fx.Node, Any] = {}
    for node in {i for n in region for i in n.all_input_nodes} - region:
        fake = fake_value(node)
        is_number = isinstance(fake, Tensor) and fake.is_floating_point()
        if is_number and not _has_value(node, weights):
            shape = concrete(fake.shape, PROOF_BATCH, 1)
            known[node] = torch.randn(shape, generator=generator).to(fake.dtype)
    try:
        return bool(evaluate(query, known, weights, 1)[..., -1].eq(1).all())
    except Exception:  # noqa: BLE001 - what cannot be run alone is not known to be 1
        return False


def _has_value(node: fx.Node, weights: Mapping[str, Tensor]) -> bool:
    weight = weights.get(node.name)
    return weight is not None and not isinstance(weight, nn.Parameter) and not weight.is_meta
