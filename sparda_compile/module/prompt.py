"""Reading a prompt: in which program, and in how many pieces.

    forward of T columns -> chunks of `SpardaConfig.chunk_tokens` -> one call of a program each

Where that is None, a prompt is one chunk if the GPU has the memory that this is worked out to take,
else the largest chunks for which it has. That asks the driver what is free, and no kernel to end.
What the largest prompt of the KV cache would take is worked out once; if it fits, that is all.

A chunk is a turn: it attends to what the cache holds, then the cache takes it in. So selections are
the same however a prompt is cut. Kernels of all chunks begin to compile before the first is read.
The columns of a short chunk are rounded up by hidden ones, see `program/prompt_graphs.py`.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.program.chunks import RESERVE, chunk_sizes, largest_chunk
from sparda_compile.program.prompt_graphs import num_read
from sparda_compile.report.text import format_bytes
from sparda_compile.runtime.device_pool import free_device_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparda_compile.module.programs import Programs
    from sparda_compile.program.program import Program
    from sparda_compile.runtime.kv_cache import KVCache

__all__ = ["Reading", "chunks_of", "read_prompt"]

_log = logging.getLogger(__name__)


def chunks_of(num_columns: int, chunk_tokens: int | None) -> list[tuple[int, int]]:
    """Return where each chunk of a prompt begins and ends.

    Args:
        num_columns: T, two or more.
        chunk_tokens: Columns of one chunk; None is all of them.
    """
    step = chunk_tokens or num_columns
    return [(begin, min(begin + step, num_columns)) for begin in range(0, num_columns, step)]


@dataclasses.dataclass(frozen=True)
class Reading:
    """New tokens of a prompt, before they are read.

    Attributes:
        programs: The module's programs.
        kv: The cache; it has room for the tokens.
        shape: B sequences, T columns.
        may_hide: Whether some token is not real.
        last_only: Whether the logits of the last token alone are wanted.
    """

    programs: Programs
    kv: KVCache
    shape: tuple[int, int]
    may_hide: bool
    last_only: bool

    def chunks(self) -> list[tuple[int, int]]:
        """Return where each chunk begins and ends; nothing has been read yet if it raises.

        Raises:
            UnsupportedInputError: If even the smallest chunks take more memory than there is.
        """
        num_columns, chosen = self.shape[1], self.programs.config.chunk_tokens
        if chosen is None:
            free = free_device_bytes(self.program_of(0, num_columns).plan.captured.device)
            if free is not None:
                ranks = self.programs.ranks
                with ranks.together("room for a prompt"):
                    fits = self._fits_at_once(free)
                    chosen = num_columns if fits else self._largest(free)
                chosen = ranks.least(chosen)  # by the memory of the fullest GPU
        return chunks_of(num_columns, chosen)

    def program_of(self, begin: int, end: int) -> Program:
        """Return the program that reads a chunk."""
        batch, phase = self.shape[0], self._phase(begin, end)
        return self.programs.get(phase, batch, self.kv.layout.max_tokens, last_only=self.last_only)

    def _phase(self, begin: int, end: int) -> str:
        return self.programs.prompt_phase(self.shape[0], self.kv.longest + begin, end - begin)

    def _fits_at_once(self, free: int) -> bool:
        """Whether all columns can be read at once: what is larger fits, or they do."""
        num_columns, num_past, most = self.shape[1], self.kv.most_past, self.kv.layout.max_tokens
        program = self.program_of(0, num_columns)
        for sizes in (
            (max(num_columns, most), max(num_past, most)),
            (_power_of_two(num_columns), _power_of_two(num_past)),
            (num_columns, num_past),
        ):
            memory = program.prompt_memory(*sizes, may_hide=self.may_hide)
            if memory.peak_bytes * RESERVE <= free:
                return True
        return False

    def _largest(self, free: int) -> int:
        """Return the size of the largest chunks that fit."""
        config, num_columns = self.programs.config, self.shape[1]
        chunk = largest_chunk(config, num_columns, lambda n: self._taken(n) * RESERVE <= free)
        if chunk is not None:
            _log.info("%s are free: a prompt is read %d at once", format_bytes(free), chunk)
            return chunk
        smallest = chunk_sizes(config, num_columns)[-1]
        taken = min(self._taken(smallest), self._taken(num_columns))
        if taken <= free:  # the reserve is no reason to refuse it
            return smallest if self._taken(smallest) == taken else num_columns
        logits = "" if self.last_only else ", or pass logits_to_keep=1 if not all logits are needed"
        raise UnsupportedInputError(
            f"a prompt of {self.shape[0]} x {num_columns} tokens behind {self.kv.most_past} takes "
            f"{format_bytes(taken)} of GPU memory beside weights and KV cache even if "
            f"{smallest} are read at once, and {format_bytes(free)} are free. Pass fewer "
            "sequences, let other caches go, or make the KV cache smaller (page_ratio, max_tokens, "
            f"offload='always'){logits}. With SpardaConfig.chunk_tokens it is tried all the same."
        )

    def _taken(self, chunk: int) -> int:
        """Return the most bytes that are taken while the prompt is read in chunks of a size."""
        # Of equal chunks of one phase the last has the longest past.
        chunks = chunks_of(self.shape[1], chunk)
        last = {(self._phase(*place), place[1] - place[0]): place for place in chunks}
        most = logits = 0
        for begin, end in last.values():
            size, num_past = max(end - begin, 2), self.kv.most_past + begin
            memory = self.program_of(begin, end).prompt_memory(
                size, num_past, may_hide=self.may_hide or end - begin == 1
            )
            logits = 0 if self.last_only else memory.logits_bytes // size
            most = max(most, memory.peak_bytes + begin * logits)
        # In the end the logits of all chunks are there twice.
        return max(most, 2 * self.shape[1] * logits if len(chunks) > 1 else 0)


def _power_of_two(number: int) -> int:
    """Return the least power of two that is not less; 0 for 0."""
    return 1 << (number - 1).bit_length() if number else 0


def read_prompt(
    reading: Reading,
    chunks: Sequence[tuple[int, int]],
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Take in a prompt, or a later turn of two tokens or more.

    Args:
        reading: What is read.
        chunks: Its `chunks()`.
        ids: [B, T] int64.
        positions: [B, T] int64.
        mask: [B, T] bool, which tokens are real; None says that all are.

    Returns:
        Logits [B, T or 1, vocabulary].
    """
    found: list[Tensor] = []
    kv = reading.kv
    for begin, end in chunks if len(chunks) > 1 else ():
        columns = num_read(ids.shape[0], end - begin, ids.device)
        reading.program_of(begin, end).compile_kernels(columns, kv.most_past + begin)
    for begin, end in chunks:
        program = reading.program_of(begin, end)
        hidden = num_read(ids.shape[0], end - begin, ids.device) - (end - begin)
        real = mask
        if hidden and mask is None:
            real = torch.ones_like(ids, dtype=torch.bool)
        logits = program(
            _columns(ids, begin, end, hidden),
            _columns(positions, begin, end, hidden),
            None if real is None else _columns(real, begin, end, hidden),
            kv,
            num_hidden=hidden,
        )
        found.append(logits[:, begin - end :])
    return found[-1] if reading.last_only else torch.cat(found, dim=1)


def _columns(part: Tensor, begin: int, end: int, hidden: int) -> Tensor:
    """Return some columns behind hidden ones, which are 0 in all parts."""
    return F.pad(part[:, begin:end], (hidden, 0)).contiguous()
