"""What ops for a prompt take on a GPU beside their results, in bytes.

Each follows what the launcher, or torch's attention, allocates; see `isa.table.Instruction`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "SCORE_BYTES",
    "TILE_ROWS",
    "UNION_BYTES",
    "WINDOW_TOKENS",
    "attend_tokens_bytes",
    "prefill_attention_bytes",
    "select_past_bytes",
    "select_tokens_bytes",
    "union_entries",
    "union_words",
    "unions_bytes",
    "window_attention_bytes",
]

SCORE_BYTES: Final = 64 << 20
"""Of block scores that are there at once: a part of the L2 cache, from which they are read."""
UNION_BYTES: Final = 64 << 20
"""Of the unions of tiles that are there at once."""
TILE_ROWS: Final = 64
"""Query vectors of a tile of a prompt's tokens; those of 32 bits, and very long ones, are fewer."""
WINDOW_TOKENS: Final = 512
"""Tokens of a prompt that are read at once by attention over a sliding window."""
# Positions and orders of tokens, for each token of each sequence.
_PLACES: Final = 32
# Queries that see their keys at once where a mask says which.
_MASKED_QUERIES: Final = 256


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _places(query_BHTD: Tensor) -> int:
    return _PLACES * int(query_BHTD.shape[0] * query_BHTD.shape[2])


def select_past_bytes(a: Any) -> int:
    """Return what `select_past` takes: scores of the past."""
    return _scores(a, a.num_past // a.block_size + 1) if a.num_past else 0


def _scores(a: Any, num_blocks: int) -> int:
    vectors = int(a.query.shape[0] * a.summary[0].shape[1] * a.query.shape[2])
    return int(min(SCORE_BYTES, vectors * min(a.num_blocks, num_blocks) * 8))


def select_tokens_bytes(a: Any) -> int:
    """Return what `select_tokens` takes: scores, and of Quest the parts of the mean query."""
    num_tokens = int(a.query.shape[2])
    vectors = int(a.query.shape[0] * a.summary[0].shape[1]) * num_tokens
    num_blocks = -(-(a.num_past + num_tokens) // a.block_size)
    if a.near_ids is not None and a.num_past:
        num_blocks = -(-num_tokens // a.block_size) + 3
    parts = 0
    if a.selector == "quest":
        width, itemsize = a.query.shape[3], a.query.dtype.itemsize
        parts = vectors * width * (3 * 4 + 2 * 2 * 3 * itemsize)
    return int(_scores(a, num_blocks) + _places(a.query) + parts)


def union_entries(num_blocks: int, tokens: int, selected: int) -> int:
    """Return the most blocks that a tile of tokens reads, of K each."""
    return min(num_blocks, tokens * selected)


def union_words(tokens: int) -> int:
    """Return the words of 32 bits that hold a bit for each token of a tile, a power of two."""
    return 1 << (-(-tokens // 32) - 1).bit_length()


def unions_bytes(num_blocks: int, tokens: int, selected: int) -> int:
    """Return the bytes that `gpu.token_blocks.Unions` takes for one tile and pair."""
    entries = union_entries(num_blocks, tokens, selected)
    return 8 * entries + 4 * union_words(tokens) * num_blocks + 4


def attend_tokens_bytes(a: Any) -> int:
    """Return what `attend_tokens` takes: unions of some tiles, and the order of tokens."""
    batch, groups, num_tokens, selected = a.block_ids.shape
    tokens = max(TILE_ROWS * groups // a.query.shape[1], 1)
    each = unions_bytes(a.slots.shape[2], tokens, selected)
    unions = batch * groups * -(-num_tokens // tokens) * each
    return int(min(UNION_BYTES, unions)) + _places(a.query)


def prefill_attention_bytes(a: Any) -> int:
    """Return what `prefill_attention` takes: of padded prompts the tensors in another order."""
    keys, queries = _bytes(a.k) + _bytes(a.v), _bytes(a.query)
    if a.num_past or a.softcap:
        length = int(a.num_past + a.k.shape[2])
        past = int(keys * a.num_past // a.k.shape[2])
        if a.query.device.type == "cuda":  # the past and the new tokens, side by side
            return int(past + keys) + _places(a.query)
        return past + _masked(a, keys + past, length, int(a.query.shape[2]))
    sums = math.prod(a.query.shape[:3]) * 4
    # On an H200 a prompt takes as much as if cuDNN's result were moved; on a CPU nothing is.
    moved = queries if a.query.device.type == "cuda" else 0
    return int(sums) + moved + (3 * queries + keys if a.may_hide else 0)


def window_attention_bytes(a: Any) -> int:
    """Return what `window_attention` takes: the ring in order, and what a band reads and makes."""
    ring = _bytes(a.ring_k) + _bytes(a.ring_v)
    window, tokens = int(a.ring_k.shape[2]), min(int(a.query.shape[2]), WINDOW_TOKENS)
    length = window + tokens - 1
    vectors = a.query.shape[0] * tokens * a.query.shape[1] * a.query.shape[3]
    queries = int(vectors) * a.query.dtype.itemsize
    return int(ring + queries) + _masked(a, ring // window * length, length, tokens)


def _masked(a: Any, keys: int, length: int, tokens: int) -> int:
    """Return what attention by a mask takes: keys once more for each head, masks, its parts.

    Args:
        a: What the op is given: `query`, [B, H, any, D], and `softcap`.
        keys: Bytes of keys and values, before that.
        length: Keys.
        tokens: Queries.
    """
    batch, heads, _, dim = a.query.shape
    repeated = 2 * batch * heads * length * dim * a.query.dtype.itemsize
    pairs = batch * min(tokens, _MASKED_QUERIES) * length
    # A byte says what is seen. With a soft cap all scores are there, in float32, before and behind
    # it; else torch makes a number of the query's kind of each byte.
    masks = pairs * (1 + (12 * heads if a.softcap else a.query.dtype.itemsize))
    parts = batch * heads * tokens * dim * a.query.dtype.itemsize
    return int(keys + repeated + masks + parts)
