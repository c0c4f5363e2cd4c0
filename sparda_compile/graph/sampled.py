"""Real values of a graph's nodes for some tokens of a very long prompt.

A mask is a function of two positions. To know it at a million tokens nobody needs the mask of a
million tokens: the nodes that make it are run on a few hundred positions, as if the tokens between
them were not there. For that to be true a node must treat each position for itself (compare, add,
unsqueeze), or know how positions become places (arange, tril, a slice of a table). A node that does
neither raises `NotProvableError`; nothing is guessed.

    %arange : arange(num_tokens)         -> positions [S]
    %le     : le(%arange[:, None], ...)  -> [S, S] of these positions
"""

from __future__ import annotations

import dataclasses
import operator
import re
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from sparda_compile.graph.evaluate import PROOF_BATCH, NotProvableError, ancestors, tensor_value
from sparda_compile.graph.nodes import call_name, fake_value
from sparda_compile.sizes import NUM_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Positions", "constants_of", "evaluate_at"]


def _names(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text))


_POINTWISE: Final = _names(
    """abs add and bitwise_and bitwise_not bitwise_or bitwise_xor bool bitwise_left_shift
    bitwise_right_shift ceil clamp clamp_max clamp_min clone contiguous copy cos detach div divide
    double dropout eq exp float floor floor_divide floordiv fmod ge greater greater_equal gt half
    int invert isfinite isinf isnan le less less_equal log log1p log2 logical_and logical_not
    logical_or logical_xor long lshift lt masked_fill max maximum min minimum mod mul multiply
    nan_to_num ne neg not_equal or pow relu remainder rsub round rshift sigmoid sign sin sqrt square
    sub subtract tanh to truediv true_divide trunc type type_as where xor"""
)
_SHAPED: Final = _names(
    """broadcast_to empty empty_like expand expand_as flatten full full_like new_empty new_full
    new_ones new_zeros ones ones_like permute repeat reshape scalar_tensor squeeze swapaxes t tensor
    transpose unflatten unsqueeze view view_as zeros zeros_like rand_like movedim numpy_T
    as_tensor"""
)
_OVER_KEYS: Final = frozenset({"softmax", "log_softmax"})
_TRIANGLES: Final = {"tril": operator.le, "triu": operator.ge}


@dataclasses.dataclass(frozen=True)
class Positions:
    """Some tokens of a prompt.

    Attributes:
        values: [S] int64, ascending; S is no other size of the graph.
        length: Tokens of the prompt.
    """

    values: Tensor
    length: int

    def __len__(self) -> int:
        return len(self.values)


@dataclasses.dataclass(frozen=True)
class _Size:
    """A number made of the prompt's length: what it is in a shape here, and in truth."""

    here: Any
    truth: Any


def constants_of(nodes: Iterable[fx.Node], weights: Mapping[str, Tensor]) -> set[int]:
    """Return the whole numbers that some nodes compute with, where a mask may change."""
    found: set[int] = set()

    def note(leaf: Any) -> Any:
        if isinstance(leaf, (int, float)) and 1 < abs(leaf) < 2**40:
            found.update((int(abs(leaf)), int(abs(leaf)) + 1))
        return leaf

    for node in nodes:
        fx.node.map_aggregate((node.args, node.kwargs), note)
        weight = weights.get(node.name)
        if weight is not None and weight.numel() <= 64 and not weight.is_meta:
            fx.node.map_aggregate(tuple(weight.flatten().tolist()), note)
    return found


def evaluate_at(
    target: fx.Node,
    positions: Positions,
    known: Mapping[fx.Node, Tensor],
    weights: Mapping[str, Tensor],
) -> Tensor:
    """Compute a node's value for some tokens of a long prompt, on the CPU.

    Args:
        target: Node to compute.
        positions: The tokens; where the node has T for a size, the result has S.
        known: Values of nodes, for these tokens; nothing above them is computed.
        weights: Values of placeholders.

    Raises:
        NotProvableError: If a node reads a weight, or mixes tokens in a way that is not known.
    """
    values: dict[fx.Node, Any] = dict(known)
    run = _Run(positions, weights, values)
    needed = ancestors(target, known)
    for node in target.graph.nodes:
        if node in needed:
            values[node] = run.value_of(node)
    result: Tensor = values[target]
    return result


class _Run:
    """Computes one node after another."""

    def __init__(
        self, positions: Positions, weights: Mapping[str, Tensor], values: dict[fx.Node, Any]
    ) -> None:
        self._positions = positions
        self._weights = weights
        self._values = values

    def value_of(self, node: fx.Node) -> Any:
        """Return the value of a node whose inputs have theirs."""
        if node.op == "placeholder":
            return self._placeholder(node)
        name = call_name(node)
        if self._is_of_sizes(node):
            here, truth = (self._call(node, *self._arguments(node, k)) for k in ("here", "truth"))
            return _Size(here, truth)
        in_place = name.endswith("_") and node.op == "call_method"
        plain = name.rstrip("_")
        args, kwargs = self._arguments(node, "truth" if plain in _POINTWISE else "here")
        if plain == "arange":
            return self._arange(node, args, kwargs)
        if plain in _TRIANGLES:
            return self._triangle(plain, *args, **kwargs)
        if plain == "getitem":
            return self._item(node, *args)
        if plain in _OVER_KEYS:
            self._check_over_keys(node, args, kwargs)
        elif plain not in _POINTWISE | _SHAPED or _reduces(plain, args, kwargs):
            raise NotProvableError(
                f"whether its mask is causal at every distance cannot be told: {name} mixes tokens"
            )
        if in_place:
            args = (args[0].clone(), *args[1:])
        return self._call(node, args, kwargs)

    def _is_of_sizes(self, node: fx.Node) -> bool:
        is_size = isinstance(fake_value(node), int)
        return is_size and any(isinstance(self._values[n], _Size) for n in node.all_input_nodes)

    def _arguments(self, node: fx.Node, kind: str) -> tuple[Any, Any]:
        def value(arg: Any) -> Any:
            if isinstance(arg, torch.device):
                return torch.device("cpu")
            found = self._values[arg] if isinstance(arg, fx.Node) else arg
            return getattr(found, kind) if isinstance(found, _Size) else found

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), value)
        return args, kwargs

    @staticmethod
    def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _placeholder(self, node: fx.Node) -> Any:
        fake = fake_value(node)
        if not isinstance(fake, Tensor):
            if node.name == NUM_TOKENS:
                return _Size(len(self._positions), self._positions.length)
            return PROOF_BATCH
        if node.name in self._weights:
            return tensor_value(node, self._weights)
        if node.name != "position_ids":
            raise NotProvableError(f"its mask depends on {node.name}")
        return self._positions.values.expand(PROOF_BATCH, len(self._positions))

    def _arange(self, node: fx.Node, args: Any, kwargs: Any) -> Tensor:
        numbers = [*args, *(kwargs[n] for n in ("start", "end", "step") if n in kwargs)]
        start = numbers[0] if len(numbers) > 1 else 0
        end = numbers[1] if len(numbers) > 1 else numbers[0]
        step = numbers[2] if len(numbers) > 2 else 1
        options = {k: v for k, v in kwargs.items() if k not in ("start", "end", "step")}
        if not any(isinstance(self._values[n], _Size) for n in node.all_input_nodes):
            return torch.arange(start, end, step, **options)
        if end - start != len(self._positions) or step != 1:
            raise NotProvableError("its mask counts positions in a way that is not known")
        return (self._positions.values + start).to(options.get("dtype") or torch.int64)

    def _triangle(self, name: str, matrix: Tensor, diagonal: int = 0, **_: Any) -> Tensor:
        size = len(self._positions)
        if size not in matrix.shape[-2:]:
            return torch.tril(matrix, diagonal) if name == "tril" else torch.triu(matrix, diagonal)
        if tuple(matrix.shape[-2:]) != (size, size):
            raise NotProvableError(f"its mask takes {name} of {tuple(matrix.shape)}")
        index = self._positions.values
        keep = _TRIANGLES[name](index[None, :] - index[:, None], diagonal)
        return torch.where(keep, matrix, torch.zeros((), dtype=matrix.dtype))

    def _item(self, node: fx.Node, source: Any, index: Any) -> Any:
        if not isinstance(source, Tensor):
            return source[index]
        given = index if isinstance(index, tuple) else (index,)
        if all(isinstance(part, Tensor) for part in given):
            return self._gathered(source, given)
        num_dims = sum(part is not None and part is not Ellipsis for part in given)
        dim, result, size = 0, source, len(self._positions)
        for part in given:
            if part is None:
                result = result.unsqueeze(dim)
            elif part is Ellipsis:
                dim += source.dim() - num_dims - 1
            elif isinstance(part, int):
                if result.shape[dim] == size:
                    raise NotProvableError("its mask picks out single tokens")
                result, dim = result.select(dim, part), dim - 1
            elif isinstance(part, slice):
                result = self._slice(result, dim, part)
            else:
                raise NotProvableError("its mask is gathered by an index")
            dim += 1
        return result

    def _gathered(self, source: Tensor, index: tuple[Tensor, ...]) -> Tensor:
        """Return elements at indices, which are positions where a dimension is of tokens."""
        places = []
        for dim, rows in enumerate(index):
            if rows.dtype == torch.bool:
                raise NotProvableError("its mask is gathered by another mask")
            if source.shape[dim] == len(self._positions):
                values = self._positions.values
                found = torch.searchsorted(values, rows).clamp(max=len(values) - 1)
                if not torch.equal(values[found], rows):
                    raise NotProvableError("its mask is gathered by an index")
                rows = found
            places.append(rows)
        return source[tuple(places)]

    def _slice(self, tensor: Tensor, dim: int, part: slice) -> Tensor:
        size, length = len(self._positions), tensor.shape[dim]
        start, stop = part.start or 0, length if part.stop is None else part.stop
        if part.step not in (None, 1):
            raise NotProvableError("its mask skips tokens")
        if (start, stop) == (0, length):
            return tensor
        if length != size and stop - start == size:
            rows = self._positions.values + start
            if int(rows[-1]) >= length:
                raise NotProvableError(f"its mask is read from a table of {length} positions")
            return tensor.index_select(dim, rows)
        if length == size:
            raise NotProvableError("its mask cuts off tokens")
        return tensor.narrow(dim, start, min(stop, length) - start)

    def _check_over_keys(self, node: fx.Node, args: Any, kwargs: Any) -> None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dim not in (-1, args[0].dim() - 1):
            raise NotProvableError(f"its {call_name(node)} is not over the keys")


def _reduces(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a call of `max` or `min` is the one over a dimension, or over everything."""
    of_two = len(args) > 1 and isinstance(args[1], Tensor)
    return name in ("max", "min") and not of_two
