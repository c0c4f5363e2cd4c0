"""How many tokens of a prompt are read at once, where `SpardaConfig.chunk_tokens` leaves it open.

    all of them     if what that takes, worked out (`memory.py`), is free
    else            the most for which it is: a multiple of 8192, or below that a power of two, cut
                    to whole blocks, and so to whole runs of tokens that select together

To read more at once is never slower: each chunk reads the past again.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparda_compile.config import SpardaConfig

__all__ = ["RESERVE", "chunk_sizes", "largest_chunk"]

RESERVE: Final = 1.08
"""Bytes to have free for each that is worked out: torch's allocator rounds up and leaves holes."""
_STEP: Final = 8192


def chunk_sizes(config: SpardaConfig, num_tokens: int) -> list[int]:
    """Return the sizes of chunks to choose from, largest first; the last is the smallest there is.

    Args:
        config: Its blocks are those of which a chunk is a multiple.
        num_tokens: Columns of the prompt; each chunk has fewer, but for the last size.
    """
    unit = config.block_size  # a multiple of `shared_tokens`
    wanted = [*range(num_tokens // _STEP * _STEP, 0, -_STEP)]
    wanted += [1 << bit for bit in range(_STEP.bit_length() - 2, -1, -1)]
    whole = [size - size % unit for size in wanted]
    return [*dict.fromkeys(size for size in whole if unit < size < num_tokens), unit]


def largest_chunk(config: SpardaConfig, num_tokens: int, fits: Callable[[int], bool]) -> int | None:
    """Return the most columns that can be read at once; None if not even the fewest can.

    Args:
        config: See `chunk_sizes`.
        num_tokens: Columns of the prompt, all of which cannot.
        fits: Whether chunks of a size fit. What is larger takes as much or more, but for small
            differences by what reads the past: so sizes are tried by halving, and what is returned
            fits in any case.
    """
    sizes = chunk_sizes(config, num_tokens)
    place = bisect.bisect_left(sizes, True, key=fits)
    return sizes[place] if place < len(sizes) else None
