"""Proof by evaluation: a piece may run on a few tokens at a time.

A piece is token-wise if what it computes for some tokens depends on these tokens alone. Then a long
prompt needs its intermediate values for one slice of tokens at a time. A piece is run on a few
tokens with made-up weights, in float32, and once more in parts:

    piece(x)[:, a:b] == piece(x[:, a:b])       of each result with a token dimension
    piece(x)         == piece(x[:, a:])        of each other: the last tokens alone decide it

Where a mask or a rotation changes with a position, positions on both sides are among the tokens. A
linear layer treats each token for itself whatever its weight is, so a cheap one stands for it: the
proof of a large model takes as long as that of a small one.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import threading
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from sparda_compile.graph.evaluate import PROOF_BATCH, NotProvableError
from sparda_compile.graph.nodes import call_name, fake_value
from sparda_compile.graph.sampled import constants_of
from sparda_compile.sizes import NUM_TOKENS, concrete, size_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparda_compile.program.pieces import Piece

__all__ = ["TokenDims", "token_dims"]

log = logging.getLogger(__name__)

# Ranges of columns that a run is made of: each begins where the one before ends.
_PARTS: Final = (((0, 3), (3, 10), (10, 12)), ((0, 7), (7, 12)))
_NUM_TOKENS: Final = 12
# Of whole numbers that are no positions: fewer than any table of embeddings has rows.
_FEW: Final = 8
_FAR: Final = 1 << 20
_TOLERANCE: Final = 1e-4
_HALF: Final = (torch.float16, torch.bfloat16)
_TO_HALF: Final = frozenset({"half", "bfloat16"})


@dataclasses.dataclass(frozen=True)
class TokenDims:
    """Where a piece has its tokens.

    Attributes:
        inputs: Token dimension of each input, None for one that has none.
        outputs: The same of each result; one that has none comes of the last tokens alone.
        reason: Why the piece is not token-wise; empty where it is.
    """

    inputs: tuple[int | None, ...] = ()
    outputs: tuple[int | None, ...] = ()
    reason: str = ""


def token_dims(piece: Piece) -> TokenDims:
    """Return where a piece has its tokens, or why it cannot run on a few of them at a time.

    Found once for pieces that compute the same.
    """
    with _LOCK:
        if piece.key not in _FOUND:
            _FOUND[piece.key] = _token_dims(piece)
        return _FOUND[piece.key]


_LOCK: Final = threading.RLock()
_FOUND: Final[dict[str, TokenDims]] = {}


def _token_dims(piece: Piece) -> TokenDims:
    try:
        inputs, outputs = (tuple(map(_token_dim, n)) for n in (piece.inputs, piece.outputs))
        dims = TokenDims(inputs, outputs)
        if not any(dim is not None for dim in dims.inputs):
            raise NotProvableError("none of its inputs has tokens")
        _prove(piece, dims)
    except NotProvableError as error:
        log.debug("%s runs whole, not on slices of a prompt: %s", piece.name, error)
        return TokenDims(reason=str(error))
    return dims


def _token_dim(node: fx.Node) -> int | None:
    """Return the token dimension of a value, None if its shape has nothing to do with tokens."""
    value: Tensor = fake_value(node)
    sizes = [size_of(int(number)) for number in value.shape]
    found = [i for i, size in enumerate(sizes) if size.tokens_power]
    if not found:
        return None
    size = sizes[found[0]]
    if len(found) > 1 or (size.factor, size.batch_power, size.tokens_power) != (1, 0, 1):
        raise NotProvableError(f"{node.name} has tokens in a dimension that they share")
    return found[0]


def _prove(piece: Piece, dims: TokenDims) -> None:
    """Run a piece whole and in parts.

    Raises:
        NotProvableError: If it is not token-wise, or cannot be run.
    """
    nodes = list(piece.graph_module.graph.nodes)
    error: Exception | None = None
    # Positions far away first; a table of learned positions may not reach so far.
    for positions in (_positions(nodes), torch.arange(_NUM_TOKENS)):
        given = _given(piece, dims, positions)
        try:
            wanted = _run(piece, given, _NUM_TOKENS)
            for parts in _PARTS:
                _compare(piece, dims, given, wanted, parts)
        except NotProvableError:
            raise
        except Exception as again:  # noqa: BLE001 - what cannot be run alone is not proved
            error = again
        else:
            return
    raise NotProvableError(f"it cannot be run alone ({type(error).__name__}: {error})")


def _compare(
    piece: Piece,
    dims: TokenDims,
    given: Sequence[Any],
    wanted: Sequence[Tensor],
    parts: Sequence[tuple[int, int]],
) -> None:
    for begin, end in parts:
        some = [
            value if dim is None else value.narrow(dim, begin, end - begin).contiguous()
            for value, dim in zip(given, dims.inputs, strict=True)
        ]
        results = zip(piece.outputs, _run(piece, some, end - begin), wanted, strict=True)
        for (node, got, whole), dim in zip(results, dims.outputs, strict=True):
            if dim is None and end != _NUM_TOKENS:
                continue
            want = whole if dim is None else whole.narrow(dim, begin, end - begin)
            if not _is_same(got, want):
                raise NotProvableError(f"{node.name} of some tokens depends on others")


def _is_same(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape:
        return False
    if not want.is_floating_point():
        return torch.equal(got, want)
    difference, largest = float((got - want).abs().max()), float(want.abs().max())
    return math.isfinite(difference) and difference <= _TOLERANCE * largest


def _positions(nodes: Sequence[fx.Node]) -> Tensor:
    """Return positions, ascending, on both sides of where something may change with them."""
    marks = sorted(constants_of(nodes, {}))[-4:]
    found = {0, 1, 2, 3, 5, _FAR - 1, _FAR}
    for mark in reversed(marks):
        found |= {mark - 1, mark} if len(found) < _NUM_TOKENS - 1 else set()
    filler = (number for number in range(6, _FAR) if number not in found)
    while len(found) < _NUM_TOKENS:
        found.add(next(filler))
    return torch.tensor(sorted(found)[:_NUM_TOKENS])


def _given(piece: Piece, dims: TokenDims, positions: Tensor) -> list[Any]:
    """Return a value for each input: numbers at random, the same for one place every time."""
    generator = torch.Generator().manual_seed(0)
    shapes_only = _weights_of_linears(piece)
    placeholders = [n for n in piece.graph_module.graph.nodes if n.op == "placeholder"]
    values = []
    mine = zip(piece.inputs, placeholders[len(piece.sizes) :], dims.inputs, strict=True)
    for node, placeholder, dim in mine:
        fake = fake_value(node)
        shape = concrete(fake.shape, PROOF_BATCH, _NUM_TOKENS)
        if placeholder in shapes_only:
            values.append(torch.empty(shape, device="meta"))
        elif node.name == "position_ids" and dim is not None:
            sizes = [1] * len(shape)
            sizes[dim] = _NUM_TOKENS
            values.append(positions.view(sizes).expand(shape).contiguous())
        else:
            values.append(_random(shape, fake.dtype, generator))
    return values


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return numbers at random. Large tensors repeat few of them, which takes no time."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not dtype.is_floating_point:
        return torch.randint(0, _FEW, shape, generator=generator).to(dtype)
    if math.prod(shape) < 1 << 16:
        return torch.randn(shape, generator=generator)
    strides = [2 * i + 1 for i in reversed(range(len(shape)))]
    count = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    return torch.randn(count, generator=generator).as_strided(shape, strides)


def _weights_of_linears(piece: Piece) -> set[fx.Node]:
    """Return the placeholders that are weights of linear layers and nothing else."""
    found = set()
    for node in piece.graph_module.graph.nodes:
        uses = [_is_linear(user) and user.args[1] is node for user in node.users]
        if node.op == "placeholder" and uses and all(uses):
            found.add(node)
    return found


def _is_linear(node: fx.Node) -> bool:
    return node.op == "call_function" and call_name(node) == "linear" and len(node.args) > 1


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Stand for a linear layer: each result is made of two of the input's numbers."""
    one, other, factor = _channels(*weight.shape)
    result = x.index_select(-1, one).sub_(x.index_select(-1, other).mul_(factor))
    return result if bias is None else result + bias


@functools.lru_cache(maxsize=16)
def _channels(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    channel = torch.arange(rows)
    factor = (channel % 5 + 1).float() / 4
    return channel * 7919 % columns, (channel * 104729 + 1) % columns, factor


def _run(piece: Piece, given: Sequence[Any], num_tokens: int) -> list[Tensor]:
    """Run the nodes of a piece on the CPU, in float32 where it computes with fewer bits."""
    sizes = [num_tokens if name == NUM_TOKENS else PROOF_BATCH for name in piece.sizes]
    rest = iter([*sizes, *given])
    values: dict[fx.Node, Any] = {}

    def value(leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            return values[leaf]
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        return torch.float32 if isinstance(leaf, torch.dtype) and leaf in _HALF else leaf

    for node in piece.graph_module.graph.nodes:
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), value)
        if node.op == "placeholder":
            values[node] = next(rest)
        elif node.op == "output":
            return list(args[0])
        elif node.op == "call_method":
            name = "float" if node.target in _TO_HALF else str(node.target)
            values[node] = getattr(args[0], name)(*args[1:], **kwargs)
        elif _is_linear(node):
            values[node] = _linear(*args, **kwargs)
        else:
            values[node] = node.target(*args, **kwargs)
    raise AssertionError("a piece ends in what it returns")
