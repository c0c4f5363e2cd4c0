"""Pick the KV blocks of every new token of a prompt: those that a decode step would pick there.

    ids[b, g, t] = select_blocks(score_blocks(query[b, :, t], summary, position[b, t]), ...)

The summary holds the keys of the new tokens already. A token sees of it what lies before its own
position, so how a prompt is cut into calls changes no selection.

With a selector whose scores settle, the past can be picked from before there are new keys:

    select_past      for each token the blocks that it would pick at the first new position, K at
                     most, with their scores
    select_tokens    given those, scores only what new tokens change, and picks among both

That is the same selection. A past block that a token picks is among the K best of the past, and its
score is the same; only blocks with a window that reaches into new tokens score anew, and they are
local to the first new position, so they are always there. On CUDA: `gpu/select_tokens.py` for
selectors that it covers; any other's `score` runs there as it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.isa.engines import current_engine
from sparda_compile.isa.table import Work
from sparda_compile.kernels.select_blocks import select_blocks_reference
from sparda_compile.kernels.workspace import select_past_bytes, select_tokens_bytes
from sparda_compile.selectors import SELECTORS, Geometry

if TYPE_CHECKING:
    from sparda_compile.selectors.base import Selector

__all__ = ["select_past", "select_tokens"]

# Numbers of a summary that are read at once, as often as there are tokens.
_MOST_NUMBERS = 1 << 24


def _empty_ids(query: Tensor, summary: Sequence[Tensor], num_selected: int) -> Tensor:
    shape = (query.shape[0], summary[0].shape[1], query.shape[2], num_selected)
    return query.new_empty(shape, dtype=torch.int32)


def _empty_past(
    query: Tensor, summary: Sequence[Tensor], num_selected: int, num_past: int
) -> tuple[Tensor, Tensor]:
    """Return what a pick of the past fills: with room for one block where there is none."""
    ids = _empty_ids(query, summary, num_selected if num_past else 1)
    return ids, torch.empty_like(ids, dtype=torch.float32)


@define(
    fake=lambda a: _empty_ids(a.query, a.summary, a.num_selected),
    behind=("update_summary",),
    work=Work.TOKEN_SCORES,
    workspace=select_tokens_bytes,
)
def select_tokens(
    query: Tensor,
    summary: Sequence[Tensor],
    positions: Tensor,
    lengths: Tensor,
    num_past: int,
    selector: str,
    scale: float,
    num_blocks: int,
    block_size: int,
    pool_size: int,
    pool_stride: int,
    num_selected: int,
    sink_blocks: int,
    local_blocks: int,
    short_list: int = 0,
    near_ids: Tensor | None = None,
    near_scores: Tensor | None = None,
) -> Tensor:
    """Score and pick the blocks of each new token.

    Args:
        query: [B, H, T, D] queries, or [B, G, T, D] forecasts.
        summary: The tensors of the selector's summary, with the new keys in them.
        positions: [B, T] int32 position of each token, -1 for padding.
        lengths: [B] int32, tokens before this call.
        num_past: No sequence has more; blocks that nobody can have cost nothing on a GPU.
        selector: Name of the selector.
        scale: Factor on q . k.
        num_blocks: N.
        block_size: P, tokens of one block.
        pool_size: Tokens of one pooled key.
        pool_stride: Tokens between pooled keys.
        num_selected: K, blocks to pick in all.
        sink_blocks: Always-kept first blocks.
        local_blocks: Always-kept blocks before the current one.
        short_list: Blocks that the query picks; for selectors that rank the rest otherwise.
        near_ids: [B, G, T, K] int32 from `select_past`, None if the past is scored here; not read
            where there is none.
        near_scores: [B, G, T, K] float32 from it.

    Returns:
        [B, G, T, K] int32 block ids, ascending, -1 where fewer than K exist and for padding.
    """
    geometry = Geometry(
        num_blocks, block_size, pool_size, pool_stride, short_list, sink_blocks, local_blocks
    )
    ids = _empty_ids(query, summary, num_selected)
    near = None
    if num_past and near_ids is not None and near_scores is not None:
        near = (near_ids, near_scores)
    if query.is_cuda:
        from sparda_compile.kernels.gpu import select_tokens as gpu

        if gpu.covers(selector, query, summary[0].shape[1], geometry):
            choice = gpu.Choice(num_selected, block_size, sink_blocks, local_blocks)
            keys = (query, summary, positions, lengths, num_past)
            asked = gpu.Asked(*keys, selector, scale, geometry)
            if near is None:
                gpu.select_tokens(asked, choice, ids)
            else:
                gpu.select_near(asked, choice, near, ids)
            return ids
    position_BT = positions.long()
    ids.copy_(_all_blocks(position_BT // block_size, num_selected))
    scorer = _Scorer(query, summary, SELECTORS[selector], scale, geometry)
    for row, columns in scorer.choosing(position_BT, num_selected):
        place = position_BT[row, columns].int()
        scores = scorer.scores(row, columns, place)
        if near is not None:
            settled = int(lengths[row]) // block_size - geometry.num_open_blocks
            scores = _of_near(scores, [part[row][:, columns] for part in near], settled)
        picked = select_blocks_reference(
            scores, place, num_selected, block_size, sink_blocks, local_blocks
        )
        ids[row, :, columns] = picked.transpose(0, 1)
    return ids


@define(
    fake=lambda a: _empty_past(a.query, a.summary, a.num_selected, a.num_past),
    results=("near_ids", "near_scores"),
    before=("update_summary",),
    work=Work.TOKEN_SCORES,
    workspace=select_past_bytes,
)
def select_past(
    query: Tensor,
    summary: Sequence[Tensor],
    positions: Tensor,
    lengths: Tensor,
    num_past: int,
    selector: str,
    scale: float,
    num_blocks: int,
    block_size: int,
    pool_size: int,
    pool_stride: int,
    num_selected: int,
    sink_blocks: int,
    local_blocks: int,
    stream: int = 0,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick for each new token the blocks that it would read at the first new position.

    Args:
        query: [B, H, T, D] queries, or [B, G, T, D] forecasts.
        summary: The tensors of the selector's summary; those of the new keys may be missing.
        positions: [B, T] int32 position of each token, -1 for padding.
        lengths: [B] int32, tokens before this call.
        num_past: No sequence has more; where it is 0 nothing is picked, nor written.
        selector: Name of a selector whose scores settle.
        scale: Factor on q . k.
        num_blocks: N.
        block_size: P, tokens of one block.
        pool_size: Tokens of one pooled key.
        pool_stride: Tokens between pooled keys.
        num_selected: K, blocks to pick in all.
        sink_blocks: Always-kept first blocks.
        local_blocks: Always-kept blocks before the current one, as many as have windows that reach
            into new tokens, or more.
        stream: 0 compute, 2 select.
        after: Result of the fork that starts the select stream's work, if this op is first on it.

    Returns:
        [B, G, T, K] int32 block ids, ascending, -1 where fewer than K exist and for padding; and
        [B, G, T, K] float32 their scores, where the token will choose by them. K is 1 where there
        is no past.
    """
    del after
    geometry = Geometry(num_blocks, block_size, pool_size, pool_stride)
    ids, kept = _empty_past(query, summary, num_selected, num_past)

    def work() -> None:
        if not num_past:
            return
        if query.is_cuda:
            from sparda_compile.kernels.gpu import select_tokens as gpu

            if gpu.covers(selector, query, summary[0].shape[1], geometry):
                choice = gpu.Choice(num_selected, block_size, sink_blocks, local_blocks)
                keys = (query, summary, positions, lengths, num_past)
                gpu.select_past(gpu.Asked(*keys, selector, scale, geometry), choice, ids, kept)
                return
        position_BT = positions.long()
        first_BT = (lengths // block_size)[:, None].where(position_BT >= 0, -1)
        ids.copy_(_all_blocks(first_BT, num_selected))
        scorer = _Scorer(query, summary, SELECTORS[selector], scale, geometry)
        for row, columns in scorer.choosing(position_BT, num_selected):
            place = lengths[row].expand(len(columns))
            scores = scorer.scores(row, columns, place)
            picked = select_blocks_reference(
                scores, place, num_selected, block_size, sink_blocks, local_blocks
            )
            ids[row, :, columns] = picked.transpose(0, 1)
            known = scores.gather(-1, picked.long().clamp(min=0))
            kept[row, :, columns] = known.transpose(0, 1)

    current_engine().submit(stream, work)
    return ids, kept


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """Scores of the reference, for as many tokens at a time as memory has room for."""

    query: Tensor
    summary: Sequence[Tensor]
    selector: Selector
    scale: float
    geometry: Geometry

    def choosing(self, position_BT: Tensor, num_selected: int) -> Iterator[tuple[int, Tensor]]:
        """Yield sequences, and columns of them that have more blocks than they may read."""
        step = max(_MOST_NUMBERS // sum(tensor[0].numel() for tensor in self.summary), 1)
        for row, position_T in enumerate(position_BT):
            chosen = torch.where(position_T >= num_selected * self.geometry.block_size)[0]
            yield from ((row, columns) for columns in chosen.split(step) if len(columns))

    def scores(self, row: int, columns: Tensor, place: Tensor) -> Tensor:
        """Return the scores of some tokens of a sequence, [n, G, N], at some positions."""
        return self.selector.score(
            self.query[row].transpose(0, 1)[columns].unsqueeze(2),
            [tensor[row].expand(len(columns), *tensor.shape[1:]) for tensor in self.summary],
            place,
            self.scale,
            self.geometry,
        )


def _all_blocks(current_BT: Tensor, num_selected: int) -> Tensor:
    """Return every block up to a token's own, [B, 1, T, K] int32; -1 behind them."""
    block_K = torch.arange(num_selected, device=current_BT.device)
    return block_K.where(block_K <= current_BT[..., None], -1).int()[:, None]


def _of_near(scores_nGN: Tensor, near_GnK: Sequence[Tensor], settled: int) -> Tensor:
    """Return scores in which the first `settled` blocks have those of near ones, or none."""
    ids_nGK, known_nGK = (part.transpose(0, 1) for part in near_GnK)
    block_N = torch.arange(scores_nGN.shape[-1], device=scores_nGN.device)
    lowest = float("-inf")
    padded = torch.nn.functional.pad(scores_nGN.masked_fill(block_N < settled, lowest), (0, 1))
    is_near = (ids_nGK >= 0) & (ids_nGK < settled)
    place = ids_nGK.long().masked_fill(~is_near, scores_nGN.shape[-1])
    return padded.scatter(-1, place, known_nGK)[..., :-1]
