"""A long prompt in slices: a token-wise piece sees some tokens at a time.

    whole results, allocated once   <--copy--   piece(slice of each input), slice after slice

So what a piece computes on its way, four times the width of the model and more, exists for one
slice; whole are the residual stream, queries, keys, values and what attention returns. A prompt of
one slice is given to the piece as it is.

    size      `SLICE_ROWS` tokens of all sequences together
    results   those of the last tokens alone, as the logits of a prompt, run for the last slice
    reuse     a result takes the memory of an input that nobody takes any more, as the residual
              stream does: a slice of it is written when the piece has read it
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from sparda_compile.graph.nodes import fake_value
from sparda_compile.program.token_wise import token_dims
from sparda_compile.sizes import BATCH_SIZE, NUM_TOKENS, concrete

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sparda_compile.program.pieces import Piece

__all__ = ["SLICE_ROWS", "SlicedPiece", "slices_of"]

SLICE_ROWS: Final = 8448
"""Tokens of a slice, of all sequences together.

On an H200 the product of so many rows with a weight of 4096 x 4096 has 1056 tiles of 128 x 256
numbers, eight full turns of its 132 multiprocessors; 8192 rows leave 3% of the last one empty. 1M
tokens of the 8.2B shape took 38.4 s, and 38.8 with 8192 (`prefill-1m` and `prefill-1m-8192`, a run
of each on one machine).
"""
# Pieces are compiled for two tokens or more.
_LEAST_TOKENS: Final = 2


def slices_of(batch: int, tokens: int) -> list[tuple[int, int]]:
    """Return where each slice of a prompt begins and ends.

    Args:
        batch: Sequences.
        tokens: Columns, two or more.
    """
    step = max(SLICE_ROWS // batch, 2 * _LEAST_TOKENS)
    if tokens <= step:
        return [(0, tokens)]
    ends = [*range(step, tokens, step), tokens]
    if ends[-1] - ends[-2] < _LEAST_TOKENS:
        ends[-2] -= _LEAST_TOKENS - 1
    return list(zip([0, *ends[:-1]], ends, strict=True))


class SlicedPiece:
    """A call of a piece, in slices where the prompt is long and the piece token-wise.

    Args:
        piece: The piece.
        function: What runs it.
        reuses: Result -> input whose memory it may take, by their places, with the call that
            makes that input; nobody takes it any more.
    """

    def __init__(
        self,
        piece: Piece,
        function: Callable[..., Sequence[Tensor]],
        reuses: Mapping[int, tuple[int, SlicedPiece]] | None = None,
    ) -> None:
        self._piece = piece
        self._function = function
        self._reuses = dict(reuses or {})

    def __call__(self, *args: Any) -> Sequence[Tensor]:
        """Run on the open sizes and the inputs."""
        names = self._piece.sizes
        sizes = dict(zip(names, args[: len(names)], strict=True))
        batch, tokens = sizes.get(BATCH_SIZE, 1), sizes[NUM_TOKENS]
        if not self.is_sliced(batch, tokens):
            return self._function(*args)
        return self._run(sizes, args[len(names) :], slices_of(batch, tokens))

    @property
    def name(self) -> str:
        """Name of the piece."""
        return self._piece.name

    @property
    def reason(self) -> str:
        """Why the piece runs whole, however long a prompt is; empty if it does not."""
        return token_dims(self._piece).reason

    def is_sliced(self, batch: int, tokens: int) -> bool:
        """Whether a prompt runs in slices."""
        return len(slices_of(batch, tokens)) > 1 and not self.reason

    def takes_memory(self, place: int) -> bool:
        """Whether a result, by its place, takes the memory of an input where it runs in slices.

        A piece that ran whole may have returned two views of one memory; slices never do.
        """
        return place in self._reuses and not self._reuses[place][1].reason

    def most_tokens(self, batch: int, tokens: int) -> int:
        """Return the columns of the longest slice that is run."""
        return max(end - begin for begin, end in self._needed(slices_of(batch, tokens)))

    def copied_bytes(self, batch: int, tokens: int) -> int:
        """Return the bytes of inputs that are copied for the longest slice."""
        most = {BATCH_SIZE: batch, NUM_TOKENS: self.most_tokens(batch, tokens)}
        all_of_them = {BATCH_SIZE: batch, NUM_TOKENS: tokens}
        total = 0
        for node, dim in zip(self._piece.inputs, token_dims(self._piece).inputs, strict=True):
            fake = fake_value(node)
            shape, wanted = _numbers(fake.shape, most), _numbers(fake.stride(), most)
            whole = _numbers(fake.stride(), all_of_them)
            if dim is not None and not _has_strides(shape, whole, wanted):
                total += math.prod(shape) * fake.dtype.itemsize
        return total

    def _needed(self, slices: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """Return the slices that are run: the last alone if no result has tokens."""
        dims = token_dims(self._piece).outputs
        return slices if any(dim is not None for dim in dims) else slices[-1:]

    def _run(
        self, sizes: dict[str, int], inputs: Sequence[Tensor], slices: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        dims = token_dims(self._piece)
        results: list[Any] = [
            None if dim is None else self._whole(i, sizes, inputs)
            for i, dim in enumerate(dims.outputs)
        ]
        for begin, end in self._needed(slices):
            here = {**sizes, NUM_TOKENS: end - begin}
            given = [
                value if dim is None else _form(value.narrow(dim, begin, end - begin), node, here)
                for value, dim, node in zip(inputs, dims.inputs, self._piece.inputs, strict=True)
            ]
            made = self._function(*here.values(), *given)
            for i, dim in enumerate(dims.outputs):
                if dim is None:
                    results[i] = made[i]
                else:
                    results[i].narrow(dim, begin, end - begin).copy_(made[i])
        return results

    def _whole(self, place: int, sizes: Mapping[str, int], inputs: Sequence[Tensor]) -> Tensor:
        """Return memory for a result: an input's that is free, or new."""
        if self.takes_memory(place):
            return inputs[self._reuses[place][0]]
        fake = fake_value(self._piece.outputs[place])
        return _empty(fake, sizes, inputs[0].device)


def _empty(fake: Tensor, sizes: Mapping[str, int], device: torch.device) -> Tensor:
    shape, strides = _numbers(fake.shape, sizes), _numbers(fake.stride(), sizes)
    return torch.empty_strided(shape, strides, dtype=fake.dtype, device=device)


def _numbers(numbers: Sequence[int], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return concrete(numbers, sizes.get(BATCH_SIZE, 1), sizes[NUM_TOKENS])


def _form(part: Tensor, node: Any, sizes: Mapping[str, int]) -> Tensor:
    """Return a slice with the strides that a piece expects of so many tokens.

    Of one sequence, nearly all slices have them as they are.
    """
    fake = fake_value(node)
    wanted = _numbers(fake.stride(), sizes)
    if _has_strides(part.shape, part.stride(), wanted):
        return part
    return _empty(fake, sizes, part.device).copy_(part)


def _has_strides(shape: Sequence[int], strides: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether strides are the wanted ones; of a single element any will do."""
    pairs = zip(shape, strides, wanted, strict=True)
    return all(mine == want for size, mine, want in pairs if size != 1)
