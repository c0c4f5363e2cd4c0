"""Causal attention of many new tokens over the cache and themselves, dense or over selected blocks.

    prefill_attention    a token at position p attends to every position <= p of its own sequence
    attend_tokens        ... of the blocks that it has selected

Dense attention takes past keys from the host pool where a block is full, else from its device page.
What tokens have selected lies in the buffer of `runtime/staging.py`. On CUDA:
`gpu/attend_tokens.py`, for groups whose query vectors fit its tile, and on Hopper GPUs
`gpu/attend_hopper.py` for what tokens have selected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.isa.table import Work
from sparda_compile.kernels.paged import block_pool, tail_pages
from sparda_compile.kernels.past import past_keys_values
from sparda_compile.kernels.workspace import attend_tokens_bytes, prefill_attention_bytes

__all__ = [
    "SelectedBlocks",
    "attend_tokens",
    "masked_attention",
    "prefill_attention",
    "real_columns",
    "token_positions",
]

_QUERY_CHUNK = 256


def token_positions(lengths_B: Tensor, token_mask_BT: Tensor | None, num_tokens: int) -> Tensor:
    """Return the position of each new token in its sequence, [B, T] int64, -1 for padding."""
    if token_mask_BT is None:
        return lengths_B.long()[:, None] + torch.arange(num_tokens, device=lengths_B.device)
    position = lengths_B.long()[:, None] + token_mask_BT.long().cumsum(1) - 1
    return position.masked_fill(~token_mask_BT, -1)


def real_columns(token_mask_BT: Tensor) -> Tensor:
    """Return the column of each real token in order, [B, T] int64; those of padding come last."""
    return (~token_mask_BT).byte().argsort(dim=1, stable=True)


def masked_attention(
    query_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    query_position_BT: Tensor,
    key_position_BS: Tensor,
    scale: float,
    softcap: float,
    window: int,
    blocks: SelectedBlocks | None = None,
) -> Tensor:
    """Attend by position: keys at 0 <= position <= the query's, inside the window if there is one.

    The i-th of the last T keys, and what is behind it, is too late for what comes before query i.
    Computed in the query's dtype for chunks of queries, so memory is linear in T. With `blocks`,
    keys of a token's own blocks alone.
    """
    groups = k_BGSD.shape[1]
    num_past = k_BGSD.shape[2] - query_BHTD.shape[2]
    repeat = query_BHTD.shape[1] // groups
    keys = k_BGSD.repeat_interleave(repeat, dim=1)
    values = v_BGSD.repeat_interleave(repeat, dim=1)
    chunks = []
    for start in range(0, query_BHTD.shape[2], _QUERY_CHUNK):
        position = query_position_BT[:, start : start + _QUERY_CHUNK, None]
        end = num_past + start + _QUERY_CHUNK  # no token sees a later one
        key_position = key_position_BS[:, None, :end]
        seen = (key_position >= 0) & (key_position <= position)
        if window:
            seen &= key_position > position - window
        # Padding attends to everything, so that no row is empty, and is zeroed below.
        padding = position < 0
        seen |= padding
        seen = seen[:, None]
        if blocks is not None:
            seen = seen & blocks.hold(key_position, start, start + _QUERY_CHUNK)
            seen = (seen | padding[:, None]).repeat_interleave(repeat, dim=1)
        query = query_BHTD[:, :, start : start + _QUERY_CHUNK]
        if softcap:
            scores = query.float() @ keys[:, :, :end].float().transpose(-1, -2) * scale
            scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~seen, float("-inf"))
            out = (scores.softmax(-1) @ values[:, :, :end].float()).to(query.dtype)
        else:
            out = F.scaled_dot_product_attention(
                query, keys[:, :, :end], values[:, :, :end], attn_mask=seen, scale=scale
            )
        chunks.append(out.masked_fill(padding[:, None], 0.0))
    return torch.cat(chunks, dim=2)


@dataclasses.dataclass(frozen=True)
class SelectedBlocks:
    """The blocks that each new token reads.

    Attributes:
        ids: [B, G, T, K] int32, -1 for none.
        num_blocks: N.
        size: Tokens of one block.
    """

    ids: Tensor
    num_blocks: int
    size: int

    def hold(self, key_position_B1S: Tensor, start: int, end: int) -> Tensor:
        """Whether keys lie in the blocks of tokens `start` to `end`, [B, G, t, S] bool.

        Args:
            key_position_B1S: Position of each key; what is negative belongs to no block.
            start: First token.
            end: Token behind the last one; there may be fewer.
        """
        ids = self.ids[:, :, start:end].long()
        ids = ids.masked_fill(ids < 0, self.num_blocks)
        chosen = ids.new_zeros(*ids.shape[:3], self.num_blocks + 1, dtype=torch.bool)
        chosen.scatter_(-1, ids, True)
        block = (key_position_B1S // self.size).clamp(min=0)[:, None]
        return chosen.gather(-1, block.expand(*ids.shape[:3], block.shape[-1]))


@define(
    fake=lambda a: _token_major(torch.empty_like(a.query)),
    before=("extend_kv",),  # which may evict what attention reads of the past
    workspace=prefill_attention_bytes,
)
def prefill_attention(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor,
    lengths: Tensor,
    pages: Tensor,
    host: Tensor,
    block_table: Tensor,
    scale: float,
    softcap: float,
    num_past: int,
    may_hide: bool,
    kv_format: str = "model",
    key_codes: Tensor | None = None,
    key_span: Tensor | None = None,
    key_base: Tensor | None = None,
    tail: Tensor | None = None,
) -> Tensor:
    """Attend densely to the past and to the new tokens.

    Args:
        query: [B, H, T, D].
        k: [B, G, T, D] new keys, not in the cache yet.
        v: [B, G, T, D] new values.
        token_mask: [B, T] bool, which tokens are real.
        lengths: [B] int32, tokens in the cache.
        pages: [B, G, C, 2, P, D]; or stored runs, see `paged.py`.
        host: [B, G, N, 2, P, D], or addresses (see `runtime.transfer`), or empty without offload.
        block_table: [B, G, N] int32.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        num_past: No sequence has more tokens in the cache.
        may_hide: Whether some token may not be real; else the mask is all true.
        kv_format: How blocks in CPU memory are written.
        key_codes: As for `runtime.transfer.fetch_blocks`, like the next two.
        key_span: [B, G, N, D].
        key_base: [B, G, N, D].
        tail: [B, G, 2, 2, P, D] beside stored runs, the block that is being written.

    Returns:
        [B, H, T, D]; zero for tokens that are not real. A token's heads lie side by side.
    """
    keys = [each for each in (key_codes, key_span, key_base) if each is not None]
    written, pool = (kv_format, keys, tail), block_pool(pages, tail)
    if query.is_cuda and (num_past or softcap):
        from sparda_compile.kernels.gpu import attend_tokens as gpu

        if gpu.covers(query, pool, block_table):
            past, factors = (pages, host, block_table), (scale, softcap)
            return gpu.attend_all(
                query, (k, v), token_mask, lengths, past, num_past, factors, *written
            )
    is_reference = not query.is_cuda
    if may_hide and is_reference:
        may_hide = not bool(token_mask.all())
    if num_past or softcap or (may_hide and is_reference):
        past = (pages, host, block_table[:, :, : -(-num_past // pool.shape[4])])
        out = _attend(query, (k, v), token_mask, lengths, past, (scale, softcap), written)
    elif may_hide:
        out = _causal_of_real(query, k, v, token_mask, scale)
    else:
        out = _causal(query, k, v, scale)
    return _token_major(out)


def _token_major(out_BHTD: Tensor) -> Tensor:
    """Return the same with a token's heads side by side, as the next projection reads them.

    What `scaled_dot_product_attention` returns lies like that already.
    """
    _, heads, num_tokens, dim = out_BHTD.shape
    if out_BHTD.stride() == (num_tokens * heads * dim, dim, heads * dim, 1):
        return out_BHTD
    return out_BHTD.transpose(1, 2).contiguous().transpose(1, 2)


def _attend(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    token_mask: Tensor,
    lengths: Tensor,
    past: tuple[Tensor, Tensor, Tensor],
    factors: tuple[float, float],
    written: tuple[str, Sequence[Tensor], Tensor | None],
) -> Tensor:
    """Attend to the new tokens, and of the past to what the block table that is given lists."""
    (k, v), (pages, host, block_table) = new, past
    position_BT = token_positions(lengths, token_mask, k.shape[2])
    past_k, past_v = past_keys_values(pages, host, block_table, lengths, *written)
    index = torch.arange(past_k.shape[2], device=k.device)
    past_BS = index.where(index < lengths[:, None], -1)
    # What lies past a sequence's end may be anything, NaN too: weight 0 must win.
    empty = (past_BS < 0)[:, None, :, None]
    return masked_attention(
        query,
        torch.cat([past_k.masked_fill(empty, 0.0), k], dim=2),
        torch.cat([past_v.masked_fill(empty, 0.0), v], dim=2),
        position_BT,
        torch.cat([past_BS, position_BT], dim=1),
        *factors,
        0,
    )


def _causal(query: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, k, v, is_causal=True, scale=scale, enable_gqa=True)


def _causal_of_real(
    query_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, token_mask_BT: Tensor, scale: float
) -> Tensor:
    """Attend causally among the real tokens: moved to the front, none of them sees padding."""
    column_BT = real_columns(token_mask_BT)

    def moved(tensor_BHTD: Tensor, column_BT: Tensor) -> Tensor:
        return tensor_BHTD.gather(2, column_BT[:, None, :, None].expand_as(tensor_BHTD))

    query, k, v = (moved(tensor, column_BT) for tensor in (query_BHTD, k_BGTD, v_BGTD))
    place_BT = (token_mask_BT.long().cumsum(1) - 1).clamp(min=0)
    out = moved(_causal(query, k, v, scale), place_BT)
    return out.masked_fill(~token_mask_BT[:, None, :, None], 0.0)


@define(
    mutates=("staging",),
    fake=lambda a: _token_major(torch.empty_like(a.query)),
    before=("extend_kv",),  # which takes new tokens into the page that attention reads
    work=Work.TOKEN_BLOCKS,
    workspace=attend_tokens_bytes,
)
def attend_tokens(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor,
    tokens: Sequence[Tensor],
    lengths: Tensor,
    staging: Tensor,
    slots: Tensor,
    pages: Tensor,
    block_table: Tensor,
    scale: float,
    softcap: float,
    is_tail: bool = False,
) -> Tensor:
    """Attend to the selected blocks of the past and of the new tokens, causally.

    Args:
        query: [B, H, T, D].
        k: [B, G, T, D] new keys, not in the cache yet.
        v: [B, G, T, D] new values.
        block_ids: [B, G, T, K] int32 blocks that each token reads, -1 for none.
        tokens: Of the new ones the positions [B, T], columns [B, T] and totals [B], int32, from
            `number_tokens`.
        lengths: [B] int32, tokens in the cache.
        staging: [B, G, S, 2, P, D], see `runtime.staging`; its slots of new blocks are written.
        slots: [B, G, N] int32, the slot of each past block that is read.
        pages: [B, G, C, 2, P, D]; has the older tokens of the first new token's block.
        block_table: [B, G, N] int32.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        is_tail: Whether `pages` is `tail`, beside pages of stored runs.

    Returns:
        [B, H, T, D]; zero for tokens that are not real.
    """
    staged, paged = (staging, slots), (pages, tail_pages(block_table, is_tail=is_tail))
    if query.is_cuda:
        from sparda_compile.kernels.gpu import attend_tokens as gpu

        if gpu.covers(query, pages, block_table):
            return gpu.attend_tokens(
                query, (k, v), block_ids, tokens, lengths, staged, paged, (scale, softcap)
            )
    position_BT, _, total_B = (numbers.long() for numbers in tokens)
    _pack(k, v, position_BT, lengths, staging, paged)
    num_past = int(lengths.max())  # host-sync: the reference alone
    size = staging.shape[4]
    keys, values, place_BS = _by_position(
        staged, lengths, total_B, -(-(num_past + k.shape[2]) // size)
    )
    blocks = SelectedBlocks(block_ids, block_table.shape[2], size)
    return _token_major(
        masked_attention(query, keys, values, position_BT, place_BS, scale, softcap, 0, blocks)
    )


def _pack(
    k: Tensor,
    v: Tensor,
    position_BT: Tensor,
    lengths: Tensor,
    staging: Tensor,
    paged: tuple[Tensor, Tensor],
) -> None:
    """Write the blocks of the new tokens to their slots, behind the older tokens of the first."""
    (pages, block_table), size = paged, staging.shape[4]
    first_B = lengths.long() // size
    row = torch.where(lengths % size > 0)[0]
    heads = torch.arange(pages.shape[1], device=pages.device)
    page_nG = block_table[row, :, first_B[row]].long()
    staging[row, :, 0] = pages[row[:, None], heads, page_nG]
    row, column = torch.where(position_BT >= 0)
    position = position_BT[row, column]
    slot, offset = position // size - first_B[row], position % size
    staging[row, :, slot, 0, offset] = k[row, :, column].to(staging.dtype)
    staging[row, :, slot, 1, offset] = v[row, :, column].to(staging.dtype)


def _by_position(
    staged: tuple[Tensor, Tensor], lengths: Tensor, totals: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first blocks in order: keys and values [B, G, S, D], zero where nothing is.

    Third, the position of each key, [B, S]; -1 where there is none.
    """
    (staging, slots), size = staged, staged[0].shape[4]
    block_n = torch.arange(num_blocks, device=slots.device)
    new_Bn = block_n - lengths.long()[:, None] // size
    old_BGn = slots[:, :, block_n.clamp(max=slots.shape[2] - 1)].long()
    slot_BGn = torch.where((new_Bn >= 0)[:, None], new_Bn[:, None], old_BGn)
    place = torch.arange(num_blocks * size, device=slots.device)
    place_BS = place.where(place < totals[:, None], -1)
    # A slot that nobody has filled may hold anything, NaN too: weight 0 must win.
    there = (slot_BGn >= 0).repeat_interleave(size, -1) & (place_BS >= 0)[:, None]
    rows = torch.arange(len(slots), device=slots.device)[:, None, None]
    heads = torch.arange(slots.shape[1], device=slots.device)[:, None]
    blocks = staging[rows, heads, slot_BGn.clamp(0, staging.shape[2] - 1)]
    keys, values = (
        part.flatten(2, 3).masked_fill(~there[..., None], 0.0) for part in blocks.unbind(3)
    )
    return keys, values, place_BS
