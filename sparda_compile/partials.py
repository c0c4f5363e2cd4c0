"""Attention in parts: of each KV block alone, merged as you choose, and taken out again.

    partial   (o, lse)  attention to some keys, and the log-sum-exp of its scores        fp32
    nothing   (0, -inf)

Each function is an op of `torch.ops.sparda`: `torch.compile` keeps it whole, it waits for nothing,
and on a GPU it is one Triton kernel. None has a gradient.

    from sparda_compile.partials import attend_blocks, merge_partials, remove_partial

    parts = attend_blocks(query, pages, page_ids, block_ids, lengths, scale)     # [B, G, K, ...]
    out, lse = merge_partials(*parts, keep=is_wanted)                            # [B, G, R, D]
    rest, lse, is_usable = remove_partial(out, lse, *merge_partials(*parts, keep=is_unwanted))

Source: PRR (arXiv 2606.30389) section 4.3, equations 6 to 8; removal is not in the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparda_compile.kernels import partials as _ops
from sparda_compile.kernels.partials import MOST_REMOVED

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MOST_REMOVED", "attend_blocks", "merge_partials", "remove_partial"]


def attend_blocks(
    query: Tensor,
    pages: Tensor,
    page_ids: Tensor,
    block_ids: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attend to each of some KV blocks alone.

    A block's partial has the same bits whatever other blocks are in the call.

    Args:
        query: [B, H, 1, D] float32, float16 or bfloat16, the token that attends.
        pages: [B, G, C, 2, P, D] contiguous, in the query's dtype: keys, then values. G divides H,
            and the H / G = R query heads of a KV head stand together.
        page_ids: [B, G, K] int32, the page of each block; any where there is no block.
        block_ids: [B, G, K] int32, in any order, -1 for none. Block n has the tokens from n * P on.
        lengths: [B] int32, position of the query's token; later ones are not seen.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.

    Returns:
        [B, G, K, R, D] float32 and [B, G, K, R] float32, accumulated in float32; (0, -inf) where
        there is no block.

    Raises:
        UnsupportedInputError: If shapes, dtypes or devices do not fit, or `pages` is not
            contiguous.
    """
    parts: tuple[Tensor, Tensor] = _ops.attend_blocks(
        query, pages, page_ids, block_ids, lengths, scale, softcap
    )
    return parts


def merge_partials(
    partial_out: Tensor, partial_lse: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge partials of keys that have none in common, in their order.

    Another order changes the result by rounding alone: each is within (S + 8) * 2^-23 of the
    largest partial of a column.

    Args:
        partial_out: [..., S, R, D] float32.
        partial_lse: [..., S, R] float32; -inf for a partial of nothing, whose output may then hold
            anything, NaN too.
        keep: [..., S] bool, which of them count; the others may hold anything. None for all.

    Returns:
        [..., R, D] float32 and [..., R] float32; (0, -inf) where nothing counts, or S is 0.

    Raises:
        UnsupportedInputError: If shapes, dtypes or devices do not fit.
    """
    merged: tuple[Tensor, Tensor] = _ops.merge_partials(partial_out, partial_lse, keep)
    return merged


def remove_partial(
    out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, limit: float = MOST_REMOVED
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a partial out of a merged one that it is part of, without attending again.

    What is left has the error of what was given times 1 / (1 - r), for a share r of the mass that
    goes. So it is refused where r is more than a limit: attend again there.

    Args:
        out: [..., R, D] float32, of all.
        lse: [..., R] float32.
        part_out: [..., R, D] float32, of what goes.
        part_lse: [..., R] float32; -inf if nothing goes, and `part_out` may then hold anything.
        limit: Largest share r that may go, 0 or more and less than 1.

    Returns:
        [..., R, D] float32 and [..., R] float32 of what is left, and [..., R] bool: whether it may
        be used. Where it may not, what is there is (0, -inf).

    Raises:
        UnsupportedInputError: If shapes, dtypes or devices do not fit, or the limit is none.
    """
    left: tuple[Tensor, Tensor, Tensor] = _ops.remove_partial(out, lse, part_out, part_lse, limit)
    return left
