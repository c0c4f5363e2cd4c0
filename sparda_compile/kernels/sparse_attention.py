"""Decode attention over the selected KV blocks, one partial result per split of the ids.

    split s   :  ids s*n .. s*n + n-1                                    n = `blocks_per_split`
    partial   :  o_s, lse_s = softmax(q K_s^T * scale) V_s               fp32
    merge     :  lse = logsumexp_s lse_s ;  o = sum_s exp(lse_s - lse) o_s

Splits depend on shapes alone and are merged in order. A split with a missing block waits for it
as a whole, so the result does not depend on which blocks were resident when attention began:
`attend_resident` then `attend_missing` equals `sparse_attention` bit for bit. Merge formula: PRR
(arXiv 2606.30389) section 4.3.

Reads K*2*P*D elements per sequence and group. On CUDA: `gpu/attention.py`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.isa.engines import submit_into
from sparda_compile.isa.streams import COMPUTE
from sparda_compile.isa.table import Part, Work
from sparda_compile.kernels.paged import block_pool, stored_or_none
from sparda_compile.kernels.partials import group_partials

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparda_compile.kernels.paged import Stored

__all__ = [
    "attend_missing",
    "attend_resident",
    "blocks_per_split",
    "num_splits",
    "sparse_attention",
]

# One program has each of 132 multiprocessors, and reads 128 tokens a turn. That up to 100 share the
# memory without waiting for it, and that to begin takes as long as to read 256 tokens, is what fits
# the times of 2 to 256 pairs: `benchmarks/results/2026-11-26-h200-attention-turns.json`.
_PROGRAMS_AT_ONCE: Final = 132
_PROGRAMS_FED: Final = 100
_START_TOKENS: Final = 256
_TURN_TOKENS: Final = 128


@functools.cache
def blocks_per_split(num_pairs: int, num_selected: int, block_size: int) -> int:
    """Return how many blocks one partial result covers.

    Every split is one program. As many as run at once make a round, which lasts as long as one
    split, or longer where they are more than the memory feeds.

    Args:
        num_pairs: Sequences times KV heads.
        num_selected: K.
        block_size: P, tokens.

    Returns:
        What makes all rounds together shortest, in the fewest splits.
    """
    least = max(_TURN_TOKENS // block_size, 1)

    def cost(blocks: int) -> tuple[int, int]:
        programs = num_pairs * -(-num_selected // blocks)
        tokens = -(-blocks * block_size // _TURN_TOKENS) * _TURN_TOKENS
        rounds, rest = divmod(programs, _PROGRAMS_AT_ONCE)
        shares = rounds * _PROGRAMS_AT_ONCE + (max(rest, _PROGRAMS_FED) if rest else 0)
        starts = (rounds + (rest > 0)) * _START_TOKENS
        return tokens * shares + starts * _PROGRAMS_FED, programs

    return min(range(least, max(num_selected, least) + 1), key=cost)


def _split_size(pool: Tensor, block_ids_BGK: Tensor) -> int:
    # Sizes that a trace left open are settled here: how ids are split hangs on the numbers.
    batch, groups, selected = block_ids_BGK.shape
    return blocks_per_split(int(batch * groups), int(selected), int(pool.shape[4]))


def num_splits(pool: Tensor, block_ids_BGK: Tensor) -> int:
    """Return how many partial results there are, given a pool [B, G, C, 2, P, D] and the ids."""
    return -(-int(block_ids_BGK.shape[-1]) // _split_size(pool, block_ids_BGK))


def _in_splits(tensor_BGK: Tensor, blocks: int, fill: int) -> Tensor:
    """Return [B, G, S, n], padded with `fill`."""
    padded = F.pad(tensor_BGK, (0, -tensor_BGK.shape[-1] % blocks), value=fill)
    result: Tensor = padded.unflatten(-1, (-1, blocks))
    return result


def split_partials(
    query_BH1D: Tensor,
    pages: Tensor,
    page_ids_BGK: Tensor,
    block_ids_BGK: Tensor,
    lengths_B: Tensor,
    scale: float,
    softcap: float,
    stored: Stored | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to each split alone: [B, G, S, R, D] and [B, G, S, R], fp32."""
    blocks = _split_size(block_pool(pages, stored and stored.tail), block_ids_BGK)
    ids = (_in_splits(page_ids_BGK, blocks, 0), _in_splits(block_ids_BGK, blocks, -1))
    return group_partials(query_BH1D, pages, *ids, lengths_B, scale, softcap, stored)


def merge_partials(out_BGSRD: Tensor, lse_BGSR: Tensor) -> Tensor:
    """Merge partials in the order of the splits: [B, G, R, D] fp32."""
    total = lse_BGSR.logsumexp(2, keepdim=True)
    return (torch.exp(lse_BGSR - total)[..., None] * out_BGSRD).sum(2)


def _in_late_split(is_miss_BGK: Tensor, blocks: int) -> Tensor:
    """Return [B, G, K] bool: ids of splits that have a missing block."""
    late_BGS = _in_splits(is_miss_BGK, blocks, 0).any(-1)
    spread = late_BGS.repeat_interleave(blocks, dim=-1)
    return spread[..., : is_miss_BGK.shape[-1]]


def _launched(arguments: Mapping[str, Any], batch_size: int) -> tuple[str, ...]:
    ids, pool = arguments["block_ids"], block_pool(arguments["pages"], arguments.get("tail"))
    groups, selected = ids.shape[1:]
    is_one_split = blocks_per_split(batch_size * groups, selected, pool.shape[4]) >= selected
    return ("_partials",) if is_one_split else ("_partials", "_merge")


@define(
    fake=lambda a: torch.empty_like(a.query, memory_format=torch.contiguous_format),
    kernels=("_partials", "_merge"),
    launched=_launched,
    behind=("fetch_blocks", "wait_blocks", "append_kv"),  # a token attends to itself
)
def sparse_attention(
    query: Tensor,
    pages: Tensor,
    page_ids: Tensor,
    block_ids: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    stream: int = COMPUTE,
    after: Tensor | None = None,
    tail: Tensor | None = None,
    kv_format: str = "model",
) -> Tensor:
    """Attend to the selected blocks, all of them resident.

    Args:
        query: [B, H, 1, D].
        pages: [B, G, C, 2, P, D] device pages; or stored runs, see `paged.py`.
        page_ids: [B, G, K] int32, page of each selected block.
        block_ids: [B, G, K] int32, the blocks, -1 for none.
        lengths: [B] int32, position of the new token.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        stream: 0 compute, 3 attend.
        after: Result of the fork that starts the side stream's work, if this op is first on it.
        tail: [B, G, 2, 2, P, D] beside stored runs, the block that is being written.
        kv_format: Beside stored runs, how they are written.

    Returns:
        [B, H, 1, D] in the query's dtype.
    """
    del after
    operands = (query, pages, page_ids, block_ids)
    stored = stored_or_none(tail, kv_format)

    def attend() -> Tensor:
        if query.is_cuda:
            from sparda_compile.kernels.gpu import attention

            blocks = _split_size(block_pool(pages, tail), block_ids)
            return attention.attend(*operands, lengths, scale, softcap, blocks, stored)
        out, lse = split_partials(*operands, lengths, scale, softcap, stored)
        return merge_partials(out, lse).flatten(1, 2)[:, :, None].to(query.dtype)

    if stream == COMPUTE:
        return attend()
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    submit_into(stream, (result,), lambda: (attend(),))
    return result


def _fake_partials(arguments: Any) -> tuple[Tensor, Tensor]:
    query, block_ids = arguments.query, arguments.block_ids
    splits = num_splits(block_pool(arguments.pages, arguments.tail), block_ids)
    shape = (*block_ids.shape[:2], splits, query.shape[1] // block_ids.shape[1])
    lse = query.new_empty(shape, dtype=torch.float32)
    return query.new_empty((*shape, query.shape[-1]), dtype=torch.float32), lse


@define(
    fake=_fake_partials,
    results=("partial_out", "partial_lse"),
    work=Work.HITS,
    kernels=("_partials",),
    parts=(Part("pages", "hits", by="is_miss"),),
    behind=("append_kv",),
)
def attend_resident(
    query: Tensor,
    pages: Tensor,
    page_ids: Tensor,
    block_ids: Tensor,
    is_miss: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    stream: int = COMPUTE,
    after: Tensor | None = None,
    tail: Tensor | None = None,
    kv_format: str = "model",
) -> tuple[Tensor, Tensor]:
    """Attend to the selected blocks that are resident while the others are on their way.

    Args:
        query: [B, H, 1, D].
        pages: As for `sparse_attention`; those of missing blocks are not read for their content.
        page_ids: [B, G, K] int32.
        block_ids: [B, G, K] int32.
        is_miss: [B, G, K] bool, blocks that a copy is bringing.
        lengths: [B] int32.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        stream: 0 compute, 3 attend.
        after: Result of the fork that starts the side stream's work, if this op is first on it.
        tail: As for `sparse_attention`, like the next one.
        kv_format: How stored runs are written.

    Returns:
        Partial outputs [B, G, S, R, D] fp32 and their log-sum-exps [B, G, S, R] fp32; empty
        (0, -inf) for splits with a missing block.
    """
    del after
    pool, stored = block_pool(pages, tail), stored_or_none(tail, kv_format)
    blocks, scaling = _split_size(pool, block_ids), (scale, softcap)

    def attend() -> tuple[Tensor, Tensor]:
        if query.is_cuda:
            from sparda_compile.kernels.gpu import attention

            ids = (page_ids, block_ids, is_miss)
            return attention.partials(query, pages, *ids, lengths, *scaling, blocks, stored)
        resident = block_ids.masked_fill(_in_late_split(is_miss, blocks), -1)
        return split_partials(query, pages, page_ids, resident, lengths, *scaling, stored)

    if stream == COMPUTE:
        return attend()
    shape = (*block_ids.shape[:2], num_splits(pool, block_ids), query.shape[1] // pages.shape[1])
    lse = query.new_empty(shape, dtype=torch.float32)
    out = query.new_empty((*shape, query.shape[-1]), dtype=torch.float32)
    submit_into(stream, (out, lse), attend)
    return out, lse


@define(
    fake=lambda a: torch.empty_like(a.query, memory_format=torch.contiguous_format),
    work=Work.MISSES,
    kernels=("_partials", "_merge"),
    behind=("wait_blocks",),
)
def attend_missing(
    query: Tensor,
    pages: Tensor,
    page_ids: Tensor,
    block_ids: Tensor,
    is_miss: Tensor,
    lengths: Tensor,
    partial_out: Tensor,
    partial_lse: Tensor,
    scale: float,
    softcap: float,
    stream: int = COMPUTE,
    after: Tensor | None = None,
    tail: Tensor | None = None,
    kv_format: str = "model",
) -> Tensor:
    """Attend to the blocks that were missing and merge with the resident ones (repair).

    Args:
        query: [B, H, 1, D].
        pages: As for `sparse_attention`.
        page_ids: [B, G, K] int32.
        block_ids: [B, G, K] int32.
        is_miss: [B, G, K] bool, blocks that had to be fetched.
        lengths: [B] int32.
        partial_out: [B, G, S, R, D] fp32, from `attend_resident`.
        partial_lse: [B, G, S, R] fp32.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        stream: 0 compute, 3 attend.
        after: Result of the fork that starts the side stream's work, if this op is first on it.
        tail: As for `sparse_attention`, like the next one.
        kv_format: How stored runs are written.

    Returns:
        [B, H, 1, D] in the query's dtype.
    """
    del after
    blocks, stored = _split_size(block_pool(pages, tail), is_miss), stored_or_none(tail, kv_format)
    scaling = (scale, softcap)

    def repair() -> Tensor:
        if query.is_cuda:
            from sparda_compile.kernels.gpu import attention

            operands = (query, pages, page_ids, block_ids, is_miss, lengths)
            late = attention.partials(*operands, *scaling, blocks, stored, missing=True)
            return attention.merge(partial_out, partial_lse, late, query.dtype)
        is_late = _in_splits(is_miss, blocks, 0).any(-1)
        missing = block_ids.masked_fill(~_in_late_split(is_miss, blocks), -1)
        out, lse = split_partials(query, pages, page_ids, missing, lengths, *scaling, stored)
        out = torch.where(is_late[..., None, None], out, partial_out)
        lse = torch.where(is_late[..., None], lse, partial_lse)
        return merge_partials(out, lse).flatten(1, 2)[:, :, None].to(query.dtype)

    if stream == COMPUTE:
        return repair()
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    submit_into(stream, (result,), lambda: (repair(),))
    return result
