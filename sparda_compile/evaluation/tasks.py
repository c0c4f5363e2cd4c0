"""Retrieval and counting tasks in the manner of RULER, made in batches on any device.

A sequence is a haystack with what is to be found in it, then questions with their answers. The
same generators make training data and evaluation data. Records look like this, and everything
else of the haystack is noise: one sentence of 16 noise tokens over and over.

    RECORD key value      single_needle, multi_key, multi_query, multi_value, key_value
    LINK from to          variable_tracking: what `from` stands for, `to` stands for too

    question                 answer
    ASK key                  its value
    ASK_ALL key              all of its values, in the order of the haystack
    TRACK value              the variables of its chain, in the order of the haystack
    COMMON                   the words that occur most often, ascending
    FREQUENT                 the words that occur most often, most frequent first

The idea of the tasks is RULER's (arXiv 2404.06654); key_value is the lookup of "Lost in the
Middle" (arXiv 2307.03172). Differs from both: tokens are integers instead of English.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.counting import common_words, frequent_words
from sparda_compile.evaluation.haystack import Maker, TaskBatch
from sparda_compile.evaluation.lookup import lookup, multi_value, variable_tracking
from sparda_compile.evaluation.vocabulary import BEGIN, SPELLING_BYTES, to_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TASKS", "TaskBatch", "make_batch", "spell_batch"]

_NUM_DISTRACTORS: Final = 31
_NUM_QUERIES: Final = 4
_MAX_PAIRS: Final = 1024
_TOKENS_PER_PAIR: Final = 8


def _single_needle(maker: Maker) -> TaskBatch:
    return lookup(maker, num_records=1, num_queries=1)


def _multi_key(maker: Maker) -> TaskBatch:
    return lookup(maker, num_records=1 + _NUM_DISTRACTORS, num_queries=1)


def _multi_query(maker: Maker) -> TaskBatch:
    return lookup(maker, num_records=1 + _NUM_DISTRACTORS, num_queries=_NUM_QUERIES)


def _key_value(maker: Maker) -> TaskBatch:
    pairs = max(2, min(_MAX_PAIRS, maker.length // _TOKENS_PER_PAIR))
    return lookup(maker, num_records=pairs, num_queries=1)


TASKS: Final[dict[str, Callable[[Maker], TaskBatch]]] = {
    "single_needle": _single_needle,
    "multi_key": _multi_key,
    "multi_value": multi_value,
    "multi_query": _multi_query,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
    "key_value": _key_value,
}


def make_batch(
    task: str,
    *,
    batch_size: int,
    length: int,
    seed: int | torch.Generator = 0,
    as_bytes: bool = False,
) -> TaskBatch:
    """Make sequences of one task.

    Args:
        task: A name of `TASKS`.
        batch_size: B, sequences.
        length: T, tokens of each sequence, questions and answers included; bytes if `as_bytes`.
        seed: Seed of a generator on the CPU, or a generator, on whose device the batch is made.
            One seed gives one batch for a kind of device.
        as_bytes: Whether to spell the tokens in bytes, five for each.

    Returns:
        The sequences, where their answers are, and where the answers stand in the haystack.

    Raises:
        ConfigError: If the task is not known, or the length too small for it.
    """
    if task not in TASKS:
        raise ConfigError(f"task={task!r} is not known; use one of {', '.join(TASKS)}.")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is too small; use 1 or more.")
    if not isinstance(seed, torch.Generator):
        seed = torch.Generator().manual_seed(seed)
    tokens = length // SPELLING_BYTES if as_bytes else length
    try:
        batch = TASKS[task](Maker(batch_size, tokens, seed))
    except ConfigError as error:
        raise ConfigError(f"task={task!r}: {error}") from error
    return spell_batch(batch, length) if as_bytes else batch


def spell_batch(batch: TaskBatch, length: int) -> TaskBatch:
    """Return the batch with every token spelled in bytes, spaces before it up to `length`.

    Args:
        batch: Sequences of integers.
        length: Bytes of each spelled sequence.

    Raises:
        ConfigError: If the tokens do not fit.
    """
    padding = length - batch.ids_BT.shape[1] * SPELLING_BYTES
    if padding < 0:
        raise ConfigError(
            f"length={length} bytes cannot hold {batch.ids_BT.shape[1]} tokens of "
            f"{SPELLING_BYTES} bytes; use {length - padding} or more."
        )
    assert bool((batch.ids_BT[:, 0] == BEGIN).all())
    spelled = torch.nn.functional.pad(to_bytes(batch.ids_BT), (padding, 0), value=ord(" "))
    step = torch.arange(SPELLING_BYTES, device=spelled.device)
    positions = (padding + batch.answer_positions_A[:, None] * SPELLING_BYTES + step).flatten()
    evidence = (padding + batch.evidence_BA[..., None] * SPELLING_BYTES + step).flatten(1)
    return dataclasses.replace(
        batch,
        ids_BT=spelled,
        answer_positions_A=positions,
        evidence_BA=evidence,
        question_start=padding + batch.question_start * SPELLING_BYTES,
    )
