"""The two sizes that a program leaves open, and the numbers that stand for them in a graph.

A forward is traced with sample numbers in the place of the prompt's length and of the number of
sequences. Both are primes that divide no size of a model, so a size in the graph
says what it is made of: 524309 * 64 is the prompt's length times 64. Numbers, not symbols, since
shapes of plain numbers are computed a hundred times faster.

    sizes of values    sample numbers, in `meta["val"]`
    arguments          nodes, `num_tokens` and `batch_size`: a graph runs with any numbers
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "BATCH_SIZE",
    "NUM_TOKENS",
    "OTHER_SAMPLES",
    "SAMPLES",
    "Samples",
    "Size",
    "common_size",
    "concrete",
    "size_of",
    "size_text",
]

BATCH_SIZE: Final = "batch_size"
NUM_TOKENS: Final = "num_tokens"


@dataclasses.dataclass(frozen=True)
class Samples:
    """Numbers that stand for the open sizes; in a decode there is one token."""

    batch: int
    tokens: int

    def of(self, phase: str) -> Samples:
        """Return these for a prefill, or for a decode."""
        return self if phase == "prefill" else Samples(self.batch, 1)


# More tokens than any sliding window: transformers drops the mask of a prompt that one holds.
SAMPLES: Final = Samples(10007, 524309)
# A second trace with other numbers shows what depends on them: of a single sequence, for that is
# what a forward may treat otherwise.
OTHER_SAMPLES: Final = Samples(1, 1572869)


# More than any constant that is added to a size, and less than any sample.
_MOST_OFFSET: Final = 1000


@dataclasses.dataclass(frozen=True)
class Size:
    """A size, `factor * batch**batch_power * tokens**tokens_power + offset`."""

    factor: int
    batch_power: int = 0
    tokens_power: int = 0
    offset: int = 0

    @property
    def is_open(self) -> bool:
        """Whether it depends on an open size."""
        return bool(self.batch_power or self.tokens_power)

    def value(self, batch: Any, tokens: Any) -> Any:
        """Return the number for a batch and a prompt; both may be symbols."""
        result = self.factor
        for number, power in ((batch, self.batch_power), (tokens, self.tokens_power)):
            for _ in range(power):
                result = result * number
        return result + self.offset if self.offset else result


@functools.lru_cache(maxsize=1 << 14)
def size_of(number: int) -> Size:
    """Return what a number of a traced graph is made of."""
    powers = [0, 0]
    if number:
        for i, sample in enumerate((SAMPLES.batch, SAMPLES.tokens)):
            while number % sample == 0:
                number //= sample
                powers[i] += 1
    return Size(int(number), *powers)


def concrete(shape: Iterable[int], batch: int, tokens: int) -> tuple[int, ...]:
    """Return a shape with numbers put in for the open sizes."""
    return tuple(int(size_of(int(number)).value(batch, tokens)) for number in shape)


def size_text(number: int) -> str:
    """Return a size in words: `64`, `B`, `T`, `B*T*64`."""
    size = size_of(int(number))
    names = ["B"] * size.batch_power + ["T"] * size.tokens_power
    if size.factor != 1 or not names:
        names.append(str(size.factor))
    return "*".join(names)


def common_size(first: int, second: int, ours: Samples, theirs: Samples) -> Size | None:
    """Return the size that is one number in one trace and another in a second; None for none.

    Args:
        first: The number in the trace with the samples `ours`.
        second: The number at the same place in the trace with `theirs`.
        ours: Samples of the first trace.
        theirs: Samples of the second.
    """
    if first == second:
        return Size(first)
    for batch_power, tokens_power in ((0, 1), (1, 0), (1, 1), (0, 2), (1, 2), (2, 0), (2, 1)):
        size = Size(1, batch_power, tokens_power)
        mine, other = (int(size.value(s.batch, s.tokens)) for s in (ours, theirs))
        if mine == other:  # the size is not open in these traces
            continue
        factor, rest = divmod(first - second, mine - other)
        offset = first - factor * mine
        if rest == 0 and abs(offset) < _MOST_OFFSET:
            return Size(factor, batch_power, tokens_power, offset)
    return None
