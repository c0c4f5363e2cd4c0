"""Put new keys and values into the cache: one token per sequence, or many.

append_kv         decode: the new token goes to the tail page
extend_kv         prefill: pages for the blocks that stay resident, tokens into them
update_summary    keep a selector's summary in step with the keys
advance_lengths   end of the step: the new tokens are now past
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.isa.engines import current_engine
from sparda_compile.isa.streams import COMPUTE
from sparda_compile.isa.table import Part, Work
from sparda_compile.kernels.paged import FOUND, WRITTEN, tail_pages
from sparda_compile.runtime.block_table import assign_pages
from sparda_compile.selectors import SELECTORS, Geometry, summary_named

__all__ = ["advance_lengths", "append_kv", "extend_kv", "update_summary"]


@define(
    mutates=("pages",),
    work=Work.NEW_TOKENS,
    kernels=("_append_kv",),
    parts=(Part("pages", "current", by="lengths"),),
)
def append_kv(
    k: Tensor,
    v: Tensor,
    tail_page: Tensor,
    lengths: Tensor,
    pages: Tensor,
    is_tail: bool = False,
) -> None:
    """Write one token per sequence to its tail page.

    Args:
        k: [B, G, 1, D] new keys, after rotation.
        v: [B, G, 1, D] new values.
        tail_page: [B, G] int32, from `plan_pages`.
        lengths: [B] int32, position of the token.
        pages: [B, G, C, 2, P, D], updated.
        is_tail: Whether `pages` is `tail`, beside pages of stored runs.
    """

    def work() -> None:
        if k.is_cuda:
            from sparda_compile.kernels.gpu import append

            append.append_kv(k, v, tail_page, lengths, pages, is_tail=is_tail)
            return
        rows = torch.arange(k.shape[0])[:, None]
        heads = torch.arange(k.shape[1])
        offset = (lengths.long() % pages.shape[4])[:, None]
        page = tail_pages(tail_page, is_tail=is_tail).long()
        pages[rows, heads, page, 0, offset] = k[:, :, 0]
        pages[rows, heads, page, 1, offset] = v[:, :, 0]

    current_engine().submit(COMPUTE, work)


@define(
    mutates=("pages", "block_table", "page_block", "page_stamp"),
    before=("store_blocks", "offload_blocks"),
)
def extend_kv(
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    tokens: Sequence[Tensor],
    lengths: Tensor,
    pages: Tensor,
    block_table: Tensor,
    page_block: Tensor,
    page_stamp: Tensor,
    sink_blocks: int,
    local_blocks: int,
    eviction: str,
    is_tail: bool = False,
) -> None:
    """Give pages to the blocks that should stay resident and write the new tokens into them.

    Resident are, of the blocks that get new tokens: the first `sink_blocks`, the last
    `local_blocks` + 1, the first of them, because its older tokens are only in its page, and what
    the last token has selected, which the next token will want too. With a page for every block,
    all of them.

    Beside pages of stored runs only the tokens of the block that stays open are written, to the
    tail; what was there before moves to its second page, for the store that packs the first block.

    Args:
        k: [B, G, T, D] new keys, after rotation.
        v: [B, G, T, D] new values.
        block_ids: [B, G, T, K] int32 blocks that each token has selected; None for a dense prefill.
        tokens: Of the new ones the positions [B, T], columns [B, T] and totals [B], int32, from
            `number_tokens`.
        lengths: [B] int32, tokens before this step.
        pages: [B, G, C, 2, P, D], updated.
        block_table: [B, G, N] int32, updated.
        page_block: [B, G, C] int32, updated.
        page_stamp: [B, G, C] int32, updated.
        sink_blocks: Always-kept first blocks.
        local_blocks: Always-kept blocks before the last.
        eviction: `lru` or `fifo`.
        is_tail: Whether `pages` is `tail`, beside pages of stored runs.
    """
    if k.is_cuda:
        from sparda_compile.kernels.gpu import extend

        tables = (block_table, page_block, page_stamp)
        resident = extend.Resident(block_ids, sink_blocks, local_blocks, eviction)
        numbered = extend.Numbered(*tokens)
        extend.extend_kv(k, v, numbered, lengths, pages, tables, resident, is_tail=is_tail)
        return
    groups, num_pages, size = k.shape[1], page_block.shape[2], pages.shape[4]
    num_blocks = block_table.shape[-1]
    position_BT, _, total_B = (numbers.long() for numbers in tokens)
    block_N = torch.arange(num_blocks, device=k.device)
    first, last = (lengths.long() // size)[:, None], ((total_B - 1) // size)[:, None]
    touched = ((block_N >= first) & (block_N <= last))[:, None]
    if num_pages == num_blocks:
        kept = touched
    else:
        kept = (block_N < sink_blocks) | (block_N >= last - local_blocks) | (block_N == first)
        kept = (kept[:, None] | _last_selected(block_ids, position_BT, num_blocks)) & touched
    most = min(num_blocks, num_pages)
    ids = block_N.where(kept, num_blocks).sort(-1).values[..., :most]
    ids = ids.masked_fill(ids == num_blocks, -1).int()
    ids_BGK = ids.expand(-1, groups, -1).contiguous()
    stamp_B = (total_B - 1).clamp(min=0).int()
    assign_pages(ids_BGK, stamp_B, block_table, page_block, page_stamp, eviction)

    is_written = position_BT >= 0
    if is_tail:
        pages[:, :, FOUND] = pages[:, :, WRITTEN]
        is_written &= position_BT >= (total_B // size * size)[:, None]
    row, column = torch.where(is_written)
    position = position_BT[row, column]
    page_ng = tail_pages(block_table[row, :, position // size], is_tail=is_tail)
    token, head = torch.where(page_ng >= 0)
    row, column, offset = row[token], column[token], position[token] % size
    page = page_ng[token, head].long()
    pages[row, head, page, 0, offset] = k[row, head, column]
    pages[row, head, page, 1, offset] = v[row, head, column]


def _last_selected(
    block_ids_BGTK: Tensor | None, position_BT: Tensor, num_blocks: int
) -> Tensor | bool:
    """Return the blocks that the last real token of each sequence has selected, [B, G, N] bool."""
    if block_ids_BGTK is None:
        return False
    last_BGK = _of_last_token(block_ids_BGTK, position_BT).long()
    found = last_BGK.new_zeros(*last_BGK.shape[:2], num_blocks + 1, dtype=torch.bool)
    found.scatter_(-1, last_BGK.masked_fill(last_BGK < 0, num_blocks), True)
    return found[..., :-1]


def _of_last_token(block_ids_BGTK: Tensor, position_BT: Tensor) -> Tensor:
    """Return the ids of the last real token of each sequence, [B, G, K]; -1 where there is none."""
    rows_B = torch.arange(len(position_BT), device=position_BT.device)
    return block_ids_BGTK[rows_B, :, position_BT.argmax(1)]


def _kernel(summary: str, *, is_prompt: bool) -> Callable[..., None] | None:
    if is_prompt:
        from sparda_compile.kernels.gpu.extend_summary import PROMPT_SUMMARY_KERNELS

        return PROMPT_SUMMARY_KERNELS.get(summary)
    from sparda_compile.kernels.gpu.append import SUMMARY_KERNELS

    return SUMMARY_KERNELS.get(summary)


def _launched(arguments: Mapping[str, Any], batch_size: int) -> tuple[str, ...]:
    del batch_size
    return summary_named(arguments["summary"]).kernels


@define(
    mutates=("tensors",),
    work=Work.NEW_TOKENS,
    kernels=[name for selector in SELECTORS for name in selector.summary.kernels],
    launched=_launched,
)
def update_summary(
    k: Tensor,
    lengths: Tensor,
    tokens: Sequence[Tensor],
    tensors: Sequence[Tensor],
    summary: str,
    num_blocks: int,
    block_size: int,
    pool_size: int,
    pool_stride: int,
) -> None:
    """Take new keys into a selector's summary.

    Args:
        k: [B, G, T, D] new keys, after rotation.
        lengths: [B] int32, tokens before this step.
        tokens: Of a prompt's tokens the positions [B, T], columns [B, T] and totals [B], int32,
            from `number_tokens`; empty for one token per sequence.
        tensors: The summary's tensors, updated.
        summary: Name of the summary.
        num_blocks: N.
        block_size: P.
        pool_size: Tokens of one pooled key.
        pool_stride: Tokens between pooled keys.
    """
    geometry = Geometry(num_blocks, block_size, pool_size, pool_stride)

    def work() -> None:
        kernel = _kernel(summary, is_prompt=bool(tokens)) if k.is_cuda else None
        if kernel is None:
            token_mask_BT = tokens[0] >= 0 if tokens else None
            summary_named(summary).extend(tensors, k, lengths, token_mask_BT, geometry)
        elif tokens:
            kernel(k, tokens, lengths, tensors, geometry)
        else:
            kernel(k, lengths, tensors, geometry)

    current_engine().submit(COMPUTE, work)


@define(mutates=("last_block_ids",), is_for_later=True)
def remember_ids(block_ids: Tensor, last_block_ids: Tensor) -> None:
    """Keep this step's selection for the next step's hint.

    Args:
        block_ids: [B, G, K] int32.
        last_block_ids: [B, G, K] int32, updated.
    """
    current_engine().submit(COMPUTE, lambda: last_block_ids.copy_(block_ids))  # type: ignore[arg-type]


@define(mutates=("last_block_ids",))
def remember_last(block_ids: Tensor, positions: Tensor, last_block_ids: Tensor) -> None:
    """Keep what the last token of a prompt has selected, for the hint of the next step.

    Args:
        block_ids: [B, G, T, K] int32, what each token has selected.
        positions: [B, T] int32, -1 for padding; a sequence without a token keeps its ids.
        last_block_ids: [B, G, K] int32, updated.
    """
    last_BGK = _of_last_token(block_ids, positions)
    has_token_B11 = (positions >= 0).any(1)[:, None, None]
    last_block_ids.copy_(torch.where(has_token_B11, last_BGK, last_block_ids))


@define(
    fake=lambda a: torch.empty_like(a.last_block_ids),
    before=("remember_ids",),  # else the hint were this step's own selection
)
def recall_ids(last_block_ids: Tensor) -> Tensor:
    """Return the last step's selection as the hint for this one, [B, G, K] int32."""
    return last_block_ids.clone()


@define(mutates=("lengths",))
def advance_lengths(token_mask: Tensor | None, lengths: Tensor) -> None:
    """Count the new tokens of the step that ends here.

    Args:
        token_mask: [B, T] bool, which tokens were real; None means one per sequence.
        lengths: [B] int32, updated.
    """
    lengths += 1 if token_mask is None else token_mask.sum(1).int()
