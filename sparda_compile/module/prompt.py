"""Reading a prompt: in which program, and in how many pieces.

    forward of T columns -> chunks of `SpardaConfig.chunk_tokens` -> one call of a program each

A chunk is a turn: it attends to what the cache holds, then the cache takes it in. So selections are
the same however a prompt is cut. Kernels of all chunks begin to compile before the first is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.module.programs import Programs
    from sparda_compile.program.program import Program
    from sparda_compile.runtime.kv_cache import KVCache

__all__ = ["chunks_of", "read_prompt"]


def chunks_of(num_columns: int, chunk_tokens: int | None) -> list[tuple[int, int]]:
    """Return where each chunk of a prompt begins and ends.

    Args:
        num_columns: T, two or more.
        chunk_tokens: Columns of one chunk; None is all of them.
    """
    step = chunk_tokens or num_columns
    return [(begin, min(begin + step, num_columns)) for begin in range(0, num_columns, step)]


def read_prompt(
    programs: Programs,
    kv: KVCache,
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    *,
    last_only: bool,
) -> Tensor:
    """Take in a prompt, or a later turn of two tokens or more.

    Args:
        programs: The module's programs.
        kv: The cache; it has room for the tokens.
        ids: [B, T] int64.
        positions: [B, T] int64.
        mask: [B, T] bool, which tokens are real; None says that all are.
        last_only: Whether the logits of the last token alone are wanted.

    Returns:
        Logits [B, T or 1, vocabulary].
    """
    found: list[Tensor] = []
    chunks = chunks_of(ids.shape[1], programs.config.chunk_tokens)

    def program_of(begin: int, end: int) -> Program:
        phase = programs.prompt_phase(ids.shape[0], kv.longest + begin, end - begin)
        return programs.get(phase, ids.shape[0], kv.layout.max_tokens, last_only=last_only)

    for begin, end in chunks if len(chunks) > 1 else ():
        program_of(begin, end).compile_kernels(end - begin, kv.most_past + begin)
    for begin, end in chunks:
        program = program_of(begin, end)
        real = mask
        if end - begin == 1 and mask is None:
            real = torch.ones_like(ids, dtype=torch.bool)  # its neighbour is hidden
        logits = program(
            _columns(ids, begin, end),
            _columns(positions, begin, end),
            None if real is None else _columns(real, begin, end),
            kv,
        )
        found.append(logits[:, begin - end :])
    return found[-1] if last_only else torch.cat(found, dim=1)


def _columns(part: Tensor, begin: int, end: int) -> Tensor:
    """Return some columns; a single one gets a hidden one beside it, which is 0 in all parts.

    A program for prompts takes two columns or more.
    """
    columns = part[:, begin:end]
    if end - begin == 1:
        columns = torch.cat([torch.zeros_like(columns), columns], dim=1)
    return columns.contiguous()
