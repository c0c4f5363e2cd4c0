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

A selector that multiplies each token with all low-bit keys may look at some blocks alone:

    look        f = mean of the group's queries; candidates = its C best blocks, and the forced ones
    score       softmax masses of every head over the candidates' keys; then the K best of these

Source: candidates first, then exact scores, as in retrieval; the mean query names on real text what
the masses of all heads pick, but for a few in a hundred (docs/quality.md). A token that has no more
blocks than candidates scores all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.isa.engines import current_engine
from sparda_compile.isa.table import Work
from sparda_compile.kernels.asked import Asked
from sparda_compile.kernels.select_blocks import select_blocks_reference
from sparda_compile.kernels.selection_bytes import select_past_bytes, select_tokens_bytes
from sparda_compile.kernels.shared_sets import leads_of
from sparda_compile.selectors import SELECTORS, Geometry

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
    shared: int = 1,
    num_candidates: int = 0,
) -> Tensor:
    """Score and pick the blocks of each new token.

    Args:
        query: [B, H, T, D] queries, or [B, G*F, T, D] forecasts.
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
        shared: Tokens that read one set, see `shared_sets`.
        num_candidates: Blocks that are scored, forced ones among them, K or more: a look at all
            proposes them, for a selector that `narrows`. 0 scores all.

    Returns:
        [B, G, T, K] int32 block ids, ascending, -1 where fewer than K exist and for padding.
    """
    geometry = Geometry(
        num_blocks, block_size, pool_size, pool_stride, short_list, sink_blocks, local_blocks
    )
    choice = (num_selected, block_size, sink_blocks, local_blocks)
    near = None
    if num_past and near_ids is not None and near_scores is not None:
        near = (near_ids, near_scores)
    asked = Asked(query, summary, positions, lengths, num_past, selector, scale, geometry)
    ids = _empty_ids(query, summary, num_selected)
    if shared == 1:
        _select(asked, choice, near, num_candidates, ids)
        return ids
    leads = leads_of(positions, lengths, shared)
    if near is not None:
        near = (leads.of(near[0]), leads.of(near[1]))
    asked = leads.ask(asked, shared)
    picked = _empty_ids(asked.query, summary, num_selected)
    _select(asked, choice, near, num_candidates, picked)
    leads.spread(picked, ids)
    return ids.masked_fill_(positions[:, None, :, None] < 0, -1)


def _select(
    asked: Asked,
    choice: tuple[int, int, int, int],
    near: tuple[Tensor, Tensor] | None,
    num_candidates: int,
    ids: Tensor,
) -> None:
    """Write the blocks that each token picks to `ids`."""
    if asked.query.is_cuda:
        from sparda_compile.kernels.gpu import select_tokens as gpu

        if gpu.covers(asked.selector, asked.query, asked.num_groups, asked.geometry):
            if near is None:
                gpu.select_tokens(asked, gpu.Choice(*choice), ids, num_candidates)
            else:
                gpu.select_near(asked, gpu.Choice(*choice), near, ids)
            return
    geometry, position_BT = asked.geometry, asked.positions.long()
    look = asked.look(SELECTORS[asked.selector].forecast_selector) if num_candidates else None
    ids.copy_(_all_blocks(position_BT // geometry.block_size, choice[0]))
    for row, columns in _choosing(asked, choice[0]):
        place = position_BT[row, columns].int()
        among = None
        if look is not None:
            among = _candidates(look, row, columns, place, (num_candidates, *choice[1:]))
        scores = _scores(asked, row, columns, place, among)
        if near is not None:
            settled = int(asked.lengths[row]) // geometry.block_size - geometry.num_open_blocks
            scores = _of_near(scores, [part[row][:, columns] for part in near], settled)
        picked = select_blocks_reference(scores, place, *choice, among)
        ids[row, :, columns] = picked.transpose(0, 1)


def _candidates(
    look: Asked, row: int, columns: Tensor, place: Tensor, choice: tuple[int, int, int, int]
) -> Tensor:
    """Return which blocks some tokens of a sequence score, [n, G, N] bool: all, of no more."""
    scores = _scores(look, row, columns, place)
    ids = select_blocks_reference(scores, place, *choice).long()
    num_blocks = scores.shape[-1]
    named = scores.new_zeros((*scores.shape[:-1], num_blocks + 1), dtype=torch.bool)
    # An id that is missing goes to a place of no block.
    return named.scatter_(-1, ids.where(ids >= 0, num_blocks), value=True)[..., :-1]


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
    shared: int = 1,
    stream: int = 0,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick for each new token the blocks that it would read at the first new position.

    Args:
        query: [B, H, T, D] queries, or [B, G*F, T, D] forecasts.
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
        shared: Tokens that read one set, see `shared_sets`.
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
    choice = (num_selected, block_size, sink_blocks, local_blocks)
    asked = Asked(query, summary, positions, lengths, num_past, selector, scale, geometry)

    def work() -> None:
        if not num_past:
            return
        if shared == 1:
            _select_past(asked, choice, ids, kept)
            return
        leads = leads_of(positions, lengths, shared)
        asking = leads.ask(asked, shared)
        found = _empty_past(asking.query, summary, num_selected, num_past)
        _select_past(asking, choice, *found)
        for part, out in zip(found, (ids, kept), strict=True):
            leads.spread(part, out)
        ids.masked_fill_(positions[:, None, :, None] < 0, -1)

    current_engine().submit(stream, work)
    return ids, kept


def _select_past(
    asked: Asked, choice: tuple[int, int, int, int], ids: Tensor, kept: Tensor
) -> None:
    """Write what each token would pick of the past, and its scores."""
    if asked.query.is_cuda:
        from sparda_compile.kernels.gpu import select_tokens as gpu

        if gpu.covers(asked.selector, asked.query, asked.num_groups, asked.geometry):
            gpu.select_past(asked, gpu.Choice(*choice), ids, kept)
            return
    first_BT = (asked.lengths // asked.geometry.block_size)[:, None].where(asked.positions >= 0, -1)
    ids.copy_(_all_blocks(first_BT, choice[0]))
    for row, columns in _choosing(asked, choice[0]):
        place = asked.lengths[row].expand(len(columns))
        scores = _scores(asked, row, columns, place)
        picked = select_blocks_reference(scores, place, *choice)
        ids[row, :, columns] = picked.transpose(0, 1)
        known = scores.gather(-1, picked.long().clamp(min=0))
        kept[row, :, columns] = known.transpose(0, 1)


def _choosing(asked: Asked, num_selected: int) -> Iterator[tuple[int, Tensor]]:
    """Yield sequences, and columns that have more blocks than they may read: as fit in memory."""
    step = max(_MOST_NUMBERS // sum(tensor[0].numel() for tensor in asked.tensors), 1)
    for row, position_T in enumerate(asked.positions):
        chosen = torch.where(position_T >= num_selected * asked.geometry.block_size)[0]
        yield from ((row, columns) for columns in chosen.split(step) if len(columns))


def _scores(
    asked: Asked, row: int, columns: Tensor, place: Tensor, among: Tensor | None = None
) -> Tensor:
    """Return the scores of some tokens of a sequence, [n, G, N], at some positions.

    Of all blocks, or of those that `among` says, [n, G, N] bool.
    """
    rule = SELECTORS[asked.selector]
    scored = (
        asked.query[row].transpose(0, 1)[columns].unsqueeze(2),
        [tensor[row].expand(len(columns), *tensor.shape[1:]) for tensor in asked.tensors],
        place,
        asked.scale,
        asked.geometry,
    )
    scores: Tensor = rule.score(*scored) if among is None else rule.score_among(*scored, among)
    return scores


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
