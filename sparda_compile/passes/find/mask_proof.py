"""Proof that an attention's mask is causal, or its declared window, at every distance.

What an attention does with 24 tokens says nothing of a window of 256. Its mask is a function of two
positions, so it is computed for pairs of them (`graph/sampled.py`) up to `_LENGTH` tokens: all near
each other, around each number that the mask is computed with and its multiples, at each power of
two, at the far end, and some drawn at random. Each pair must be seen, or hidden, as the rewrite
will have it; and all that are seen count the same, or there is a bias.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from sparda_compile.graph.evaluate import PROOF_BATCH, NotProvableError, ancestors
from sparda_compile.graph.nodes import fake_value, nodes_between, tensor_shape
from sparda_compile.graph.sampled import Positions, constants_of, evaluate_at
from sparda_compile.sizes import concrete, size_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from sparda_compile.passes.find.anchors import Anchor
    from sparda_compile.passes.find.dataflow import Dataflow

__all__ = ["MaskProof", "changed_by_position"]

_LENGTH: Final = 1 << 20
_NEAR: Final = 48
_NUM_RANDOM: Final = 32
_MOST_CONSTANTS: Final = 24
_HIDDEN: Final = -1e4  # what is added to a score that is not to count is less
_TOLERANCE: Final = 1e-2


class MaskProof:
    """Proves the masks of one graph; layers with one mask are proved once.

    Args:
        flow: What flows where in the graph.
        weights: Values of placeholders.
        reach: Tokens that a text may have; nothing is proved of pairs that are further apart. 0 is
            any number.
    """

    def __init__(self, flow: Dataflow, weights: Mapping[str, Tensor], reach: int = 0) -> None:
        self._flow = flow
        self._reach = reach
        self._weights = weights
        self._found: dict[Hashable, str] = {}

    def difference(self, anchor: Anchor, window: int) -> str:
        """Say where an attention's mask is not the one claimed; empty when it nowhere is.

        Args:
            anchor: The attention, of a prefill.
            window: Tokens that a query sees, itself included; 0 for all.
        """
        key = (self._key(anchor), window)
        if key not in self._found:
            try:
                self._found[key] = self._examine(anchor, window)
            except NotProvableError as error:
                self._found[key] = str(error)
        return self._found[key]

    def _examine(self, anchor: Anchor, window: int) -> str:
        is_sdpa = anchor.form == "sdpa"
        target = _given(anchor.node, 3, "attn_mask") if is_sdpa else anchor.node.all_input_nodes[0]
        known: dict[fx.Node, Tensor] = {}
        scores = None if is_sdpa else anchor.path[-1]
        needed: set[fx.Node] = set()
        if isinstance(target, fx.Node):
            needed = ancestors(target, {scores} if scores is not None else ())
        positions = _positions({*constants_of(needed, self._weights), window, self._reach})
        if scores is not None:
            fake = fake_value(scores)
            shape = concrete(fake.shape, PROOF_BATCH, len(positions))
            known[scores] = torch.zeros(shape, dtype=fake.dtype)
        if not isinstance(target, fx.Node):
            is_causal = bool(_given(anchor.node, 5, "is_causal"))
            index = positions.values
            seen = index[:, None] >= index if is_causal else torch.ones(1, 1, dtype=torch.bool)
            return _compare(seen, positions, window, self._reach)
        if is_sdpa and target in self._flow.active:
            raise NotProvableError("its mask depends on the tokens")
        value = evaluate_at(target, positions, known, self._weights)
        return _compare(
            _seen(value) if is_sdpa else _counted(value), positions, window, self._reach
        )

    def _key(self, anchor: Anchor) -> Hashable:
        """Return what an attention's mask is made of: the same for layers that share it."""
        if anchor.form == "sdpa":
            return (
                anchor.form,
                _given(anchor.node, 3, "attn_mask"),
                _given(anchor.node, 5, "is_causal"),
            )
        scores, weights = anchor.path[-1], anchor.node.all_input_nodes[0]
        region = sorted({*nodes_between(scores, weights)})
        index = {node: i for i, node in enumerate([scores, *region])}

        def name(node: fx.Node) -> Any:
            return index.get(node, node)

        calls = tuple(
            (node.target, repr(fx.node.map_arg((node.args, node.kwargs), name))) for node in region
        )
        return anchor.form, repr(concrete(tensor_shape(scores), 1, 1)), calls


def _given(node: fx.Node, place: int, name: str) -> Any:
    return node.kwargs.get(name, node.args[place] if len(node.args) > place else None)


def changed_by_position(anchor: Anchor, flow: Dataflow, cached: Iterable[fx.Node]) -> str:
    """Say what of an attention, but its mask, reads positions behind the cache; empty for nothing.

    Args:
        anchor: The attention.
        flow: What flows where.
        cached: Nodes of the query and of the cached keys and values.
    """
    region = set().union(*(nodes_between(node, anchor.node) for node in cached))
    if anchor.form == "sdpa":
        masking = {anchor.node}
    else:
        masking = nodes_between(anchor.path[-1], anchor.node.all_input_nodes[0])
    for node in region - masking:
        for source in node.all_input_nodes:
            fake = fake_value(source)
            if source in flow.active or not isinstance(fake, Tensor):
                continue
            if any(size_of(int(size)).tokens_power for size in fake.shape):
                return f"its keys, queries or values meet positions behind the cache ({node.name})"
    return ""


def _positions(constants: set[int]) -> Positions:
    """Return the tokens at which a mask that is made with some numbers may change."""
    generator = torch.Generator().manual_seed(0)
    found = {*range(_NEAR), *range(_LENGTH - 4, _LENGTH)}
    found.update(torch.randint(0, _LENGTH, (_NUM_RANDOM,), generator=generator).tolist())
    powers = [1 << i for i in range(5, _LENGTH.bit_length())]
    edges = sorted(c for c in constants if 1 < c < _LENGTH)
    if len(edges) > _MOST_CONSTANTS:
        raise NotProvableError(f"its mask is computed with {len(edges)} different numbers")
    for c in [*powers, *(m * c for c in edges for m in (1, 2, 3))]:
        found.update((c - 1, c, c + 1))
    for c in edges:
        found.update((_LENGTH - 1 - c, _LENGTH - c, _LENGTH - 2 - c))
    values = sorted(p for p in found if 0 <= p < _LENGTH)
    # A number of tokens that no other size of the graph is.
    extra = itertools.count(_LENGTH // 3)
    while not _is_prime(len(values)) or len(values) in constants:
        values = sorted({*values, next(extra)})
    return Positions(torch.tensor(values), _LENGTH)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


def _seen(mask: Tensor) -> Tensor:
    """Return which pairs a mask lets count, from one that is bool or is added to the scores."""
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    if not bool((seen | (mask <= _HIDDEN)).all()):
        raise NotProvableError("its mask adds a bias to scores that count")
    return seen


def _counted(weights: Tensor) -> Tensor:
    """Return which pairs count, from the weights of scores that are all 0."""
    seen = weights > 0
    share = 1 / seen.sum(-1, keepdim=True).double()
    off = (weights.double() / share - 1).abs()
    if bool((off > _TOLERANCE)[seen.expand_as(off)].any()) or not bool(weights.isfinite().all()):
        raise NotProvableError(
            "its scores get a bias, or its weights do not add up to 1, as with ALiBi and sinks"
        )
    return seen


def _compare(seen: Tensor, positions: Positions, window: int, reach: int) -> str:
    index = positions.values
    want = index[:, None] >= index
    if window:
        want &= index[:, None] - index < window
    if tuple(seen.shape[-2:]) not in ((1, 1), tuple(want.shape)):
        raise NotProvableError(f"its mask has shape {tuple(seen.shape)}")
    wrong = seen != want
    if reach:
        wrong = wrong & (index[:, None] - index < reach)
    wrong = wrong.flatten(0, -3).any(0) if wrong.dim() > 2 else wrong
    if not bool(wrong.any()):
        return ""
    places = wrong.nonzero()
    row, column = places[int(places.sum(1).argmin())]
    query, key = int(index[row]), int(index[column])
    sees = "does not see" if bool(want[row, column]) else "sees"
    claimed = f"its declared window of {window} tokens" if window else "causal attention"
    return f"its mask is not {claimed}: the token at position {query} {sees} the one at {key}"
