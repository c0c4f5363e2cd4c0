"""A Forecast's projection W: one matrix, or the product of two thin ones.

    W = W        W [G*F*D, hidden]                     full
    W = U V      U [G*F*D, r], V [r, hidden]           of rank r

Rows are those of the F heads of the first KV head, then those of the second; F is 1 in SparDA. For
each of the F a projection costs no more numbers than SparDA's own, 256 rows of the hidden width (2
KV heads of 128): it is full up to G*D = 256, and beyond that has the largest rank r, a multiple of
16, with r * (G*F*D + hidden) <= 256 * F * hidden. `SpardaConfig.forecast_rank` sets another.

The matrices go by the same names in a graph, in a file and in a training: that of the layer, with
`_u` and `_v` behind it where there are two.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional as F

from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = [
    "Projection",
    "ProjectionShape",
    "from_inputs",
    "from_tensors",
    "graph_input",
    "is_input",
    "to_inputs",
    "to_tensors",
]

_FULL_ROWS: Final = 256
_RANK_STEP: Final = 16
_SUFFIXES: Final = {1: ("",), 2: ("_u", "_v")}
_NAME: Final = re.compile(r"(\d+)(|_u|_v)")
_GRAPH_PREFIX: Final = "sparda_forecast_"
_SMALLEST_SQUARE: Final = 1e-30


@dataclasses.dataclass(frozen=True)
class ProjectionShape:
    """The sizes of a projection.

    Attributes:
        rows: G*F*D, KV heads times the Forecast's heads of each times the width of one.
        hidden: Width of the hidden state that it reads.
        rank: r, or None for one full matrix.
    """

    rows: int
    hidden: int
    rank: int | None = None

    @classmethod
    def of(cls, rows: int, hidden: int, rank: int | None, heads: int = 1) -> ProjectionShape:
        """Return the shape that a projection gets.

        Args:
            rows: G*F*D.
            hidden: Width of the hidden state.
            rank: `SpardaConfig.forecast_rank`: None is the rule above; a rank whose two matrices
                are not smaller than the full one gives the full one.
            heads: F.
        """
        full = cls(rows, hidden)
        if rank is None:
            if rows <= _FULL_ROWS * heads:
                return full
            rank = _FULL_ROWS * heads * hidden // (rows + hidden)
            rank = max(rank - rank % _RANK_STEP, _RANK_STEP)
        low = cls(rows, hidden, rank)
        return low if low.num_weights < full.num_weights else full

    @property
    def factors(self) -> tuple[tuple[int, int], ...]:
        """Shapes of the matrices, in the order of their product."""
        if self.rank is None:
            return ((self.rows, self.hidden),)
        return (self.rows, self.rank), (self.rank, self.hidden)

    @property
    def num_weights(self) -> int:
        """Numbers that it holds."""
        return sum(rows * columns for rows, columns in self.factors)

    def names(self, layer: int) -> tuple[str, ...]:
        """Return the names of the matrices that predict a layer's query."""
        return tuple(f"{layer}{suffix}" for suffix in _SUFFIXES[len(self.factors)])


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """The matrices of a projection, in the order of their product.

    Attributes:
        factors: W [G*F*D, hidden], or U [G*F*D, r] and V [r, hidden].

    Raises:
        ConfigError: If they are not one matrix, or two that can be multiplied.
    """

    factors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        shapes = [tuple(factor.shape) for factor in self.factors]
        are_matrices = len(shapes) in _SUFFIXES and all(len(shape) == 2 for shape in shapes)
        if not are_matrices or shapes[0][1] != shapes[-1][-len(shapes)]:
            raise ConfigError(
                f"a Forecast projection has the shapes {shapes}; it must be one matrix [KV heads x "
                "head_dim, hidden], or two: [KV heads x head_dim, rank] and [rank, hidden]; rows "
                "are forecast_heads times as many."
            )

    @classmethod
    def truncated(cls, weight: Tensor, rank: int | None) -> Projection:
        """Return the projection of a rank that is closest to W [G*F*D, hidden].

        It is the truncated singular value decomposition, its values divided evenly between the two
        factors: U = L sqrt(S) and V = sqrt(S) R for W = L S R. None keeps W.
        """
        if rank is None:
            return cls((weight,))
        # L and S^2 are the eigenvectors and eigenvalues of W W^T, which come in ascending order.
        wide = weight.double()
        squares, left = torch.linalg.eigh(wide @ wide.T)
        left = left[:, -rank:].flip(1)
        halves = squares[-rank:].flip(0).clamp(min=_SMALLEST_SQUARE) ** 0.25
        factors = left * halves, left.T @ wide / halves[:, None]
        return cls(tuple(factor.to(weight.dtype).contiguous() for factor in factors))

    @property
    def shape(self) -> ProjectionShape:
        """Its sizes."""
        first, last = self.factors[0], self.factors[-1]
        rank = None if len(self.factors) == 1 else first.shape[1]
        return ProjectionShape(first.shape[0], last.shape[1], rank)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return W h, [..., G*F*D] for [..., hidden], as a decode step computes it."""
        for factor in reversed(self.factors):
            hidden = F.linear(hidden, factor)
        return hidden

    def product(self) -> Tensor:
        """Return W, [G*F*D, hidden]."""
        if len(self.factors) == 1:
            return self.factors[0]
        return self.factors[0] @ self.factors[1]

    def map(self, function: Callable[[Tensor], Tensor]) -> Projection:
        """Return the projection of what a function makes of each matrix."""
        return Projection(tuple(map(function, self.factors)))

    def to(self, like: Tensor | torch.dtype) -> Projection:
        """Return the projection in a dtype, or in that and on the device of a tensor."""
        return self.map(lambda factor: factor.to(like))


def to_tensors(projections: Mapping[int, Projection]) -> dict[str, Tensor]:
    """Return the matrices of projections, given by target layer, under their names."""
    return {
        name: factor
        for layer, projection in sorted(projections.items())
        for name, factor in zip(projection.shape.names(layer), projection.factors, strict=True)
    }


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[int, Projection]:
    """Do the opposite of `to_tensors`; the order of the names does not matter.

    Raises:
        ValueError: If a name is another, or a matrix is missing or one too many.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} names no projection")
        found.setdefault(int(match[1]), {})[match[2]] = tensor
    for layer, parts in found.items():
        if tuple(sorted(parts)) not in _SUFFIXES.values():
            names = ", ".join(f"{layer}{suffix}" for suffix in sorted(parts))
            raise ValueError(f"layer {layer} has {names}, not one full matrix or _u and _v")
    return {
        layer: Projection(tuple(parts[suffix] for suffix in sorted(parts)))
        for layer, parts in sorted(found.items())
    }


def to_inputs(projections: Mapping[int, Projection]) -> dict[str, Tensor]:
    """Return the matrices under the names of the graph inputs that they are."""
    return {graph_input(name): tensor for name, tensor in to_tensors(projections).items()}


def from_inputs(inputs: Mapping[str, Tensor]) -> dict[int, Projection]:
    """Return the projections among the inputs of a graph, by target layer."""
    return from_tensors(
        {
            name.removeprefix(_GRAPH_PREFIX): tensor
            for name, tensor in inputs.items()
            if is_input(name)
        }
    )


def graph_input(name: str) -> str:
    """Return the name of the graph input that a matrix of this name is."""
    return f"{_GRAPH_PREFIX}{name}"


def is_input(name: str) -> bool:
    """Return whether a graph input of this name is a matrix of a projection."""
    return name.startswith(_GRAPH_PREFIX)
