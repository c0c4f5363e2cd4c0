"""What ops for a prompt take on a GPU beside their results, in bytes.

Each follows what the launcher, or torch's attention, allocates; see `isa.table.Instruction`.
"""

from __future__ import annotations

import bisect
import functools
import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from sparda_compile.kernels.paged import block_pool
from sparda_compile.kernels.union_sizes import mark_words, union_entries, union_words, unions_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = [
    "HALVES_ROWS",
    "LEAST_BLOCKS",
    "MASS_PART_BLOCKS",
    "PART_BLOCKS",
    "QUERY_BYTES",
    "RUN_BLOCKS",
    "SCORED_TOGETHER",
    "SCORE_BYTES",
    "SCORE_COLUMNS",
    "STRIP_BLOCKS",
    "TILE_ROWS",
    "UNION_BYTES",
    "WINDOW_TOKENS",
    "ScoreRoom",
    "all_blocks_bytes",
    "attend_tokens_bytes",
    "in_halves",
    "most_vectors",
    "num_runs",
    "power_of_two",
    "prefill_attention_bytes",
    "score_columns",
    "score_room",
    "score_widths",
    "tile_rows",
    "unions_at_once",
    "window_attention_bytes",
]

SCORE_BYTES: Final = 512 << 20
"""Of block scores at once: behind a million tokens, those of 3,600 tokens with 2 KV heads."""
UNION_BYTES: Final = 256 << 20
"""Of the unions of tiles that are there at once."""
TILE_ROWS: Final = 64
"""Query vectors of a tile of a prompt's tokens; those of 32 bits, and very long ones, are fewer."""
HALVES_ROWS: Final = 128
"""Query vectors of a tile of `gpu/attend_hopper.py`, half of them for either group of warps."""
LEAST_BLOCKS: Final = 512
"""That a token picks of: for fewer it were one more kernel to compile, and hardly faster."""
# Numbers of 32 bits are multiplied by threads, not by tensor cores: those hold less.
_ROWS_OF_32_BITS: Final = 32
QUERY_BYTES: Final = 64 * 1024
"""Of a tile's queries; vectors that are too long for it are fewer."""
WINDOW_TOKENS: Final = 512
"""Tokens of a prompt that are read at once by attention over a sliding window."""
SCORE_COLUMNS: Final = 128
"""Query vectors of a program that scores; more of them read fewer keys."""
# Of queries and of a tile of keys; where vectors are long, fewer of them. Half of it for 32 bits.
_SCORE_TILE_BYTES: Final = 32 * 1024
PART_BLOCKS: Final = 256
"""Blocks of a program that scores: a token of a long sequence has several programs."""
MASS_PART_BLOCKS: Final = 128
"""The same of a program that scores the keys of all their tokens."""
RUN_BLOCKS: Final = 8
"""Neighbouring blocks whose best score is kept, to pick by; programs that score have whole runs."""
SCORED_TOGETHER: Final = 8
"""Runs that a row of their scores has whole."""
STRIP_BLOCKS: Final = 256
"""Blocks that a row of scores has whole; see `gpu/score_tiles.py`."""
# Queries that see their keys at once where a mask says which.
_MASKED_QUERIES: Final = 256


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def power_of_two(number: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `number` and `least`."""
    return max(1 << (int(number) - 1).bit_length(), least)


def tile_rows(heads: int, dim: int, dtype: torch.dtype) -> int:
    """Return the rows of a tile of attention, tokens times heads (as a power of two each).

    Args:
        heads: Query heads of a group.
        dim: D.
        dtype: Of queries.
    """
    most = _ROWS_OF_32_BITS if dtype.itemsize == 4 else TILE_ROWS
    rows = min(most, QUERY_BYTES // (power_of_two(dim) * dtype.itemsize))
    return max(rows, power_of_two(heads), 16)


def most_vectors(dims: int, itemsize: int) -> int:
    """Return how many queries, or keys, of so many numbers a program that scores can hold."""
    return 2 * _SCORE_TILE_BYTES // (dims * itemsize**2)


def score_columns(room: int, dims: int, itemsize: int) -> int:
    """Return the query vectors of a program that scores.

    Args:
        room: Vectors of one token, a power of two.
        dims: Numbers of a vector, a power of two.
        itemsize: Bytes of one.
    """
    return max(min(SCORE_COLUMNS, most_vectors(dims, itemsize)), room, 16)


def num_runs(num_blocks: int, selected: int) -> int:
    """Return how many runs of blocks have their best scores kept; 0 where that saves nothing.

    Args:
        num_blocks: That may be scored.
        selected: K, of which each lies in one of the K best runs.
    """
    listed = RUN_BLOCKS * power_of_two(selected)
    return -(-num_blocks // RUN_BLOCKS) if 4 * listed <= power_of_two(num_blocks) else 0


class ScoreRoom(NamedTuple):
    """How the tokens of a prompt take turns in the room for scores.

    Attributes:
        chunks: Tokens whose scores are there at once: the first one, and the one behind the last.
        scores: Numbers that the most of them take, of all pairs.
        sums: The same of maxima, and as many of sums, before a softmax.
        masses: The same of what each head and block has, where that is kept.
    """

    chunks: list[tuple[int, int]]
    scores: int
    sums: int
    masses: int


def score_room(
    blocks: Callable[[int], int],
    sizes: tuple[int, int, int],
    tokens: int,
    *,
    in_runs: bool,
    masses: int = 0,
) -> ScoreRoom:
    """Return how tokens take turns: many with few blocks before them, of one power of two at once.

    Args:
        blocks: Blocks that may be scored for the tokens up to one: not fewer for more.
        sizes: Sequences times KV heads; vectors of a program, see `score_columns`, and of a token.
        tokens: All of them.
        in_runs: Whether runs of blocks are scored, too.
        masses: Numbers of each token and block that are kept beside its score.
    """
    pairs, columns, room = sizes
    part = MASS_PART_BLOCKS if masses else PART_BLOCKS

    def row(end: int) -> int:
        scores = sum(score_widths(blocks(end), in_runs=in_runs))
        return pairs * (scores + masses * blocks(end))

    chunks, begin = [], 0
    while begin < tokens:
        ends = range(begin + columns, tokens + columns, columns)
        width = power_of_two(blocks(begin + columns), LEAST_BLOCKS)

        def is_too_much(end: int, begin: int = begin, width: int = width) -> bool:
            last = min(end, tokens)
            return blocks(last) > width or (end - begin) * row(last) * 4 > SCORE_BYTES

        tiles = bisect.bisect_left(ends, x=True, key=is_too_much)
        end = min(begin + max(tiles * columns, columns // room), tokens)
        chunks.append((begin, end))
        begin = end
    sums = max(-(-blocks(end) // part) * (end - begin) for begin, end in chunks)
    kept = [pairs * (end - begin) * masses * blocks(end) for begin, end in chunks]
    rows = ((end - begin) * row(end) for begin, end in chunks)
    scores = max(all_of_it - mass for all_of_it, mass in zip(rows, kept, strict=True))
    return ScoreRoom(chunks, scores, pairs * sums * room, max(kept))


def score_widths(num_blocks: int, *, in_runs: bool) -> tuple[int, int]:
    """Return the numbers that a token's scores take: those of blocks, and of runs of them."""
    runs = -(-num_blocks // RUN_BLOCKS) if in_runs else 0
    return num_blocks + -num_blocks % STRIP_BLOCKS, runs + -runs % SCORED_TOGETHER


def unions_at_once(pairs: int, num_blocks: int, tokens: int, selected: int, tiles: int) -> int:
    """Return how many tiles' unions are there at once.

    Args:
        pairs: Sequences times KV heads.
        num_blocks: N.
        tokens: Of one tile.
        selected: K.
        tiles: All of them.
    """
    return max(min(UNION_BYTES // (pairs * unions_bytes(num_blocks, tokens, selected)), tiles), 1)


def in_halves(query_BHTD: Tensor, staging: Tensor) -> bool:
    """Whether `gpu/attend_hopper.py` attends for such queries and blocks, on such a GPU.

    Args:
        query_BHTD: Queries.
        staging: [B, G, S, 2, P, D].
    """
    size, dim = staging.shape[4:]
    room = power_of_two(query_BHTD.shape[1] // staging.shape[1])
    # A word of a half has 16 bits for readers.
    fits = size == 64 and dim in (64, 128) and HALVES_ROWS // 32 <= room <= HALVES_ROWS
    fits = fits and query_BHTD.dtype in (torch.float16, torch.bfloat16)
    return fits and _is_hopper(query_BHTD.device)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def attend_tokens_bytes(a: Any) -> int:
    """Return what `attend_tokens` takes: unions of some tiles, and lists of their halves."""
    batch, groups, num_tokens, selected = a.block_ids.shape
    heads, num_blocks, pairs = a.query.shape[1] // groups, a.slots.shape[2], batch * groups
    halves = in_halves(a.query, a.staging)
    rows = HALVES_ROWS if halves else tile_rows(heads, a.query.shape[3], a.query.dtype)
    tokens = rows // power_of_two(heads)
    at_once = unions_at_once(pairs, num_blocks, tokens, selected, -(-num_tokens // tokens))
    each = unions_bytes(num_blocks, tokens, selected)
    if halves:
        # Lists are made when marks are gone: two words for each entry, and two more; and a third.
        lists = 4 * (3 * union_entries(num_blocks, tokens, selected) + 4)
        each += max(lists - 4 * mark_words(num_blocks, tokens), 0)
    return int(pairs * at_once * each)


def prefill_attention_bytes(a: Any) -> int:
    """Return what `prefill_attention` takes: of padded prompts the tensors in another order."""
    keys, queries = _bytes(a.k) + _bytes(a.v), _bytes(a.query)
    if a.num_past or a.softcap:
        if a.query.device.type == "cuda":
            return all_blocks_bytes(a)
        length = int(a.num_past + a.k.shape[2])
        past = int(keys * a.num_past // a.k.shape[2])
        return past + _masked(a, keys + past, length, int(a.query.shape[2]))
    sums = math.prod(a.query.shape[:3]) * 4
    # On an H200 a prompt takes as much as if cuDNN's result were moved; on a CPU nothing is.
    moved = queries if a.query.device.type == "cuda" else 0
    return int(sums) + moved + (3 * queries + keys if a.may_hide else 0)


def all_blocks_bytes(a: Any) -> int:
    """Return what the kernel for all blocks takes: the past and the new tokens as whole blocks.

    Beside them slots of the past, positions and columns of the new tokens, and one union.
    """
    batch, groups, num_blocks = a.block_table.shape
    pool = block_pool(a.pages, a.tail)
    size, num_tokens, pairs = pool.shape[4], int(a.k.shape[2]), batch * groups
    blocks = -(-num_tokens // size) + 1 + a.num_past // size
    staging = blocks * _bytes(pool) // pool.shape[2]
    heads = a.query.shape[1] // groups
    tokens = tile_rows(heads, a.query.shape[3], a.query.dtype) // power_of_two(heads)
    tables = 4 * pairs * num_blocks * (3 + union_words(tokens))
    return int(staging + tables + 8 * batch * num_tokens + 4 * batch)


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
