"""Tasks that look records up: by key, by key with several values, along a chain of variables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.evaluation.haystack import Maker, TaskBatch
from sparda_compile.evaluation.vocabulary import (
    ASK,
    ASK_ALL,
    FIRST_VALUE,
    LINK,
    NUM_VALUES,
    RECORD,
    TRACK,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["lookup", "multi_value", "variable_tracking"]

_WIDTH: Final = 3
_NUM_VALUES: Final = 4
_NUM_OTHERS: Final = 12
_NUM_HOPS: Final = 4
_NUM_CHAINS: Final = 2


def lookup(maker: Maker, *, num_records: int, num_queries: int) -> TaskBatch:
    """Ask for the values of some of the records, one after another.

    Args:
        maker: Draws the sequences.
        num_records: Records in the haystack, each with a key of its own.
        num_queries: Different keys to ask for; at most `num_records`.

    Raises:
        ConfigError: If the length is too small, or there are not so many keys.
    """
    num_queries = min(num_queries, num_records)
    tail = _WIDTH * num_queries
    room = maker.room(tail, _WIDTH * num_records)
    keys_BM, values_BM = maker.keys(num_records), maker.values(num_records)
    ids, device = maker.noise(), maker.device
    starts_BM = maker.places(room, num_records, _WIDTH)
    _write(ids, starts_BM, RECORD, keys_BM, values_BM)
    asked_BQ = maker.distinct(num_queries, num_records)
    start = maker.length - tail
    questions_Q = start + _WIDTH * torch.arange(num_queries, device=device)
    rows_BQ = questions_Q.expand(maker.batch_size, -1)
    _write(ids, rows_BQ, ASK, keys_BM.gather(1, asked_BQ), values_BM.gather(1, asked_BQ))
    return TaskBatch(
        ids_BT=ids,
        answer_positions_A=questions_Q + 2,
        evidence_BA=starts_BM.gather(1, asked_BQ) + 2,
        question_start=start,
    )


def multi_value(maker: Maker) -> TaskBatch:
    """Ask for the four values of a key, each in a record of its own among twelve others.

    Raises:
        ConfigError: If the length is too small.
    """
    total = _NUM_VALUES + _NUM_OTHERS
    tail = 2 + _NUM_VALUES
    room = maker.room(tail, _WIDTH * total)
    wanted_BV = maker.distinct(_NUM_VALUES, total).sort(dim=1).values
    keys = maker.keys(total + 1)
    asked_B1 = keys[:, total:]
    keys_BM = keys[:, :total].scatter(1, wanted_BV, asked_B1.expand(-1, _NUM_VALUES))
    values_BM = FIRST_VALUE + maker.distinct(total, NUM_VALUES)
    ids = maker.noise()
    starts_BM = maker.places(room, total, _WIDTH)
    _write(ids, starts_BM, RECORD, keys_BM, values_BM)
    start = maker.length - tail
    ids[:, start] = ASK_ALL
    ids[:, start + 1] = asked_B1[:, 0]
    ids[:, start + 2 :] = values_BM.gather(1, wanted_BV)
    return TaskBatch(
        ids_BT=ids,
        answer_positions_A=start + 2 + torch.arange(_NUM_VALUES, device=maker.device),
        evidence_BA=starts_BM.gather(1, wanted_BV) + 2,
        question_start=start,
        any_order=True,
    )


def variable_tracking(maker: Maker) -> TaskBatch:
    """Ask for the four variables that a value was handed on to, beside another chain.

    Raises:
        ConfigError: If the length is too small.
    """
    total = _NUM_CHAINS * _NUM_HOPS
    tail = 2 + _NUM_HOPS
    room = maker.room(tail, _WIDTH * total)
    heads_BC1 = (FIRST_VALUE + maker.distinct(_NUM_CHAINS, NUM_VALUES))[..., None]
    variables_BCH = maker.keys(total).unflatten(1, (_NUM_CHAINS, _NUM_HOPS))
    nodes = torch.cat([heads_BC1, variables_BCH], dim=2)
    # Each chain keeps its order; which chain has the next link is drawn.
    chain_BM = maker.distinct(total, total) % _NUM_CHAINS
    one_hot = torch.nn.functional.one_hot(chain_BM, _NUM_CHAINS)
    hop_BM = (one_hot.cumsum(1).gather(2, chain_BM[..., None]) - 1)[..., 0]
    flat = nodes.flatten(1)
    place_BM = chain_BM * (_NUM_HOPS + 1) + hop_BM
    ids = maker.noise()
    starts_BM = maker.places(room, total, _WIDTH)
    _write(ids, starts_BM, LINK, flat.gather(1, place_BM), flat.gather(1, place_BM + 1))
    start = maker.length - tail
    ids[:, start] = TRACK
    ids[:, start + 1 :] = nodes[:, 0]
    first_BH = (chain_BM == 0).long().topk(_NUM_HOPS, dim=1).indices.sort(dim=1).values
    return TaskBatch(
        ids_BT=ids,
        answer_positions_A=start + 2 + torch.arange(_NUM_HOPS, device=maker.device),
        evidence_BA=starts_BM.gather(1, first_BH) + 2,
        question_start=start,
    )


def _write(ids: Tensor, starts: Tensor, marker: int, first: Tensor, second: Tensor) -> None:
    """Write `marker first second` at every start, in place."""
    ids.scatter_(1, starts, marker)
    ids.scatter_(1, starts + 1, first)
    ids.scatter_(1, starts + 2, second)
