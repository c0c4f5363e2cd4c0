"""What a selection of a prompt's blocks takes on a GPU beside its results, in bytes.

Each follows what the launcher allocates, as in `workspace.py`.
"""

from __future__ import annotations

from typing import Any, Final

from sparda_compile.kernels.asked import LOW_BIT, NOSA, SOFTMAX
from sparda_compile.kernels.union_sizes import union_entries, unions_bytes
from sparda_compile.kernels.workspace import (
    SCORE_BYTES,
    num_runs,
    power_of_two,
    score_columns,
    score_room,
    unions_at_once,
)

__all__ = ["CANDIDATE_TOKENS", "candidate_tiles", "select_past_bytes", "select_tokens_bytes"]

CANDIDATE_TOKENS: Final = 8
"""Of a tile whose candidates' union is scored, where that is 16 query vectors or more."""


def select_past_bytes(a: Any) -> int:
    """Return what `select_past` takes: scores of the past, and what leads of runs take."""
    if not a.num_past:
        return 0
    leads, tokens = _leads(a)
    return leads + _scores(a, tokens, a.num_past, 1, is_past=True)


def select_tokens_bytes(a: Any) -> int:
    """Return what `select_tokens` takes: scores, and what leads of runs take."""
    leads, tokens = _leads(a)
    if a.near_ids is not None and a.num_past:
        return leads + _scores(a, tokens, 0, 2, is_new=True)
    blocks = min(-(-(a.num_past + tokens * a.shared) // a.block_size), a.num_blocks)
    if a.num_candidates and blocks > a.num_candidates:
        return leads + _by_candidates(a, tokens, blocks)
    return leads + _scores(a, tokens, a.num_past)


def candidate_tiles(
    pairs: int, num_blocks: int, tile: tuple[int, int], num_candidates: int, tiles: int
) -> int:
    """Return how many tiles of tokens have the masses of their candidates at once.

    Args:
        pairs: Sequences times KV heads.
        num_blocks: N.
        tile: Its tokens, and query vectors of a token, a power of two.
        num_candidates: C.
        tiles: All of them.
    """
    masses = 4 * pairs * tile[0] * tile[1] * num_candidates
    at_once = unions_at_once(pairs, num_blocks, tile[0], num_candidates, tiles)
    return max(min(SCORE_BYTES // masses, at_once), 1)


def _by_candidates(a: Any, tokens: int, blocks: int) -> int:
    """Return what tokens take whose candidates are scored; `blocks` is what any may have."""
    batch, groups = a.summary[0].shape[:2]
    pairs, dim, itemsize = batch * groups, a.query.shape[3], a.query.dtype.itemsize
    few = _scores(a, tokens, a.num_past, most_blocks=a.num_candidates)
    proposed, mean = 4 * pairs * tokens * a.num_candidates, pairs * tokens * dim
    look = _scores(a, tokens, a.num_past, is_look=True)
    look = max(4 * mean + itemsize * mean, itemsize * mean + look)
    room = power_of_two(a.query.shape[1] // groups)
    columns = score_columns(room, power_of_two(dim, 16), itemsize)
    # As `gpu.low_bit_tiles.Form` has it.
    own = max(min(columns, CANDIDATE_TOKENS * room), 16) // room
    tiles = -(-tokens // own)
    at_once = candidate_tiles(pairs, a.num_blocks, (own, room), a.num_candidates, tiles)
    masses = 4 * pairs * min(at_once * own, tokens) * a.num_candidates * room
    # Their slots are their ids.
    entries = union_entries(a.num_blocks, own, a.num_candidates)
    unions = unions_bytes(a.num_blocks, own, a.num_candidates) - 4 * entries
    order = 4 * (tokens + batch * tokens + batch)
    picking = _key_bytes(a, blocks) + masses + pairs * at_once * unions + order
    return int(8 * batch * tokens + max(few, proposed + max(look, picking)))


def _key_bytes(a: Any, blocks: int) -> int:
    """Return the bytes of so many blocks' low-bit keys, unpacked."""
    batch, groups = a.summary[0].shape[:2]
    sizes = a.block_size * a.query.shape[3] * a.summary[1].dtype.itemsize
    return int(batch * groups * blocks * sizes)


def _leads(a: Any) -> tuple[int, int]:
    """Return what it takes that some tokens pick for all, and how many those are."""
    batch, heads, num_tokens, dim = a.query.shape
    if a.shared == 1:
        return 0, int(num_tokens)
    tokens = -(-int(num_tokens) // a.shared) + 1
    queries = batch * heads * tokens * dim * a.query.dtype.itemsize
    picked = batch * a.summary[0].shape[1] * tokens * a.num_selected * 4
    # Of each token the run, in 64 bits; of leads columns and positions.
    return int(queries + picked + 8 * batch * num_tokens + 12 * batch * tokens), tokens


def _scores(
    a: Any,
    tokens: int,
    past: int,
    more: int = 0,
    *,
    is_new: bool = False,
    is_past: bool = False,
    is_look: bool = False,
    most_blocks: int | None = None,
) -> int:
    """Return what it takes to score blocks for so many tokens.

    Args:
        a: What the op is given.
        tokens: That are scored.
        past: Tokens before the first one, whose blocks are scored.
        more: Blocks beside those that tokens fill.
        is_new: Whether only blocks are scored that are new, which are in no runs.
        is_past: Whether only blocks of the past are.
        is_look: Whether one query for each KV head proposes candidates.
        most_blocks: No token that is scored has more.
    """
    batch, groups = a.summary[0].shape[:2]
    pairs = batch * groups
    vectors, dim, itemsize = a.query.shape[1] // groups, a.query.shape[3], a.query.dtype.itemsize
    vectors = 1 if is_look else vectors
    selected = a.num_candidates if is_look else a.num_selected
    parts = while_made = 0
    if a.selector == "quest":
        while_made, parts, vectors = _mean_parts(a, pairs * tokens * dim)
        dim, itemsize = 2 * dim, a.summary[0].dtype.itemsize
    retention = 4 * pairs * a.summary[0].shape[2] if a.selector in NOSA else 0
    room = power_of_two(vectors)
    is_low_bit = a.selector in LOW_BIT
    columns = score_columns(room, power_of_two(dim, 16), itemsize)

    most = int(a.num_blocks if most_blocks is None else min(a.num_blocks, most_blocks))

    def blocks(end: int) -> int:
        filled = past if is_past else past + end * a.shared + a.block_size - 1
        return min(most, int(filled // a.block_size) + more)

    in_runs = not retention and not is_new and num_runs(blocks(tokens), selected) > 0
    masses = room if is_low_bit else 0
    taken = score_room(blocks, (pairs, columns, room), tokens, in_runs=in_runs, masses=masses)
    if is_low_bit:
        parts = _key_bytes(a, blocks(tokens))
    sums = taken.sums if a.selector in SOFTMAX and not is_look else 1
    kept = 4 * (taken.scores + taken.masses) + 8 * sums
    return int(max(while_made, parts + retention + kept))


def _mean_parts(a: Any, numbers: int) -> tuple[int, int, int]:
    """Return what Quest's mean query takes: while it is split, and in parts; and how many.

    Args:
        a: What the op is given.
        numbers: Of all mean queries.
    """
    heads = int(a.query.shape[1] // a.summary[0].shape[1])
    if a.summary[0].dtype.itemsize == 4:
        return 28 * numbers, 8 * numbers, 1
    # All queries in 32 bits and their mean; or that, what is left of it twice, and the parts.
    return max(4 * heads + 4, 40) * numbers, 12 * numbers, 3
