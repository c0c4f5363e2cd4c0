"""Blocks of the two halves of a tile of a prompt's tokens, for `attend_hopper.py`.

A half lists the blocks of the union that its own tokens read, and learns all of a block from one
word, which it loads ahead; so does who brings the blocks to their places in shared memory.

Nobody waits for what is not for them. A place has a barrier `ready` for each kind of block: read by
the first half, by the second, or by both; and a barrier `free` for each half. A half awaits all
blocks of its kinds and frees them, and the warp that brings a block awaits who read what lay there
before. So everybody sees every phase of the barriers that they wait for.

Nobody waits for ever. Let S be the places, and G < S the most that neighbouring blocks of a half
are apart. Before the block that a half waits for, it holds of the same kind, keys or values, only
the other one of the pair, G before it at most: that is not in the way of what it waits for. So if
nobody moves, keys e wait for a half that has yet to free keys e - S and waits for values v < e - S,
and values f <= v wait for the other half, which has yet to free values f - S and waits for keys
y >= e: more than 2 S from f - S to y. But f - S is in the pair before that of y, or later, at most
three steps before: that is impossible where 3 G <= 2 S. So of a longer run of blocks that a half
does not read, it lists some, without any weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sparda_compile.kernels.gpu.launch import launch

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.kernels.gpu.token_blocks import Prompt, Unions

__all__ = [
    "LAST",
    "PLACE",
    "PLACES",
    "STEP",
    "await_block",
    "bring",
    "free_pair",
    "hold",
    "list_entries",
]

STEP: Final = 4
"""The most that neighbouring blocks of a half are apart."""
PLACES: Final = 6
"""Of keys in shared memory, and as many of values: 2 * PLACES >= 3 * STEP."""
# A half's word: bits of its readers, and from these bits on what they say.
PLACE = tl.constexpr(16)
_IS_SHARED = tl.constexpr(20)
_IS_NONE = tl.constexpr(21)
LAST = tl.constexpr(22)
_NONE = tl.constexpr(1 << 21)
_TILE: Final = 256
# Triton 3.6 has it under the second name, 3.9 under the first.
_load: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@triton.jit
def _listed(readers_at, entry, total, first, READERS: tl.constexpr):
    """Return which entries a half lists, and the bits of its readers.

    An entry that it does not read, nor the one before, is listed if its number is divisible by 3:
    so two neighbours are at most 4 apart.
    """
    inside = entry < total
    every = (1 << READERS) - 1
    bits = (tl.load(readers_at + entry, mask=inside, other=0) >> first) & every
    before = tl.load(readers_at + entry - 1, mask=inside & (entry > 0), other=0)
    near = bits | ((before >> first) & every)
    return inside & ((bits != 0) | ((near == 0) & (entry % 3 == 0))), bits


@triton.jit
def _list_half(
    words_at, rank, bits, kind, is_listed, is_shared, entry, PLACES: tl.constexpr
):  # fmt: skip
    """Write the words of the entries that a half lists; return how many, and the last one."""
    word = bits | (entry % PLACES << PLACE) | (is_shared.to(tl.int32) << _IS_SHARED)
    place = rank + tl.cumsum(is_listed.to(tl.int32), 0) - 1
    tl.store(words_at + place, word | (kind << LAST), mask=is_listed)
    last = tl.max(tl.where(is_listed, entry, -1), axis=0)
    return tl.sum(is_listed.to(tl.int32), 0), last


@triton.jit(do_not_specialize=["first_tile"])
def _list_entries(
    readers, union_counts, union_ids, union_slots, lengths, words, own_counts, brought, groups,
    num_entries, num_words, first_tile,
    READERS: tl.constexpr, SHARED: tl.constexpr, SIZE: tl.constexpr, PLACES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    tile, pair = tl.program_id(0), tl.program_id(1)
    own = pair.to(tl.int64) * tl.num_programs(0) + tile
    readers_at, brought_at = readers + own * num_entries, brought + own * num_entries
    ids_at, slots_at = union_ids + own * num_entries, union_slots + own * num_entries
    words_0, words_1 = words + own * 2 * num_words, words + (own * 2 + 1) * num_words
    total = tl.load(union_counts + own)
    shift: tl.constexpr = 0 if SHARED else READERS
    position = tl.load(lengths + pair // groups) + (first_tile + tile) * (READERS + shift)
    count_0, count_1 = total * 0, total * 0
    last_0, last_1 = total * 0, total * 0
    for start in tl.range(0, total, TILE):
        entry = start + tl.arange(0, TILE)
        inside = entry < total
        is_0, bits_0 = _listed(readers_at, entry, total, 0, READERS)
        is_1, bits_1 = _listed(readers_at, entry, total, shift, READERS)
        block = tl.load(ids_at + entry, mask=inside, other=0)
        slot = tl.load(slots_at + entry, mask=inside, other=0)
        sides = is_0.to(tl.int32) | (is_1.to(tl.int32) << 1)
        tl.store(brought_at + entry, (slot << 2) | sides, mask=inside)
        # 1 for the block of a half's first token, 2 for the next one: not all of them see all.
        kind_0 = tl.maximum(block - position // SIZE + 1, 0)
        kind_1 = tl.maximum(block - (position + shift) // SIZE + 1, 0)
        both = sides == 3
        more, last = _list_half(words_0, count_0, bits_0, kind_0, is_0, both, entry, PLACES)
        count_0, last_0 = count_0 + more, tl.maximum(last_0, last)
        more, last = _list_half(words_1, count_1, bits_1, kind_1, is_1, both, entry, PLACES)
        count_1, last_1 = count_1 + more, tl.maximum(last_1, last)
    tl.store(own_counts + own * 2, count_0)
    tl.store(own_counts + own * 2 + 1, count_1)
    # Behind an odd number there is one that nobody reads, in the place of the last one.
    tl.store(words_0 + count_0, (last_0 % PLACES << PLACE) | _NONE)
    tl.store(words_1 + count_1, (last_1 % PLACES << PLACE) | _NONE)


@gluon.jit
def bring(
    staging, brought_at, first_slot, count, buffers, ready, free, SIZE: gl.constexpr,
    OFFSET: gl.constexpr, PLACES: gl.constexpr,
) -> None:  # fmt: skip
    """Bring keys, or values, of the union's blocks to shared memory."""
    # Of each place: which half has to free it, and the phase that it does so in.
    held_0 = count * 0
    held_1 = count * 0
    phases_0 = count * 0
    phases_1 = count * 0
    place = count * 0
    word = gl.load(brought_at, mask=count > 0, other=0)
    next_word = gl.load(brought_at + 1, mask=count > 1, other=0)
    for entry in range(count):
        far_word = gl.load(brought_at + entry + 2, mask=entry + 2 < count, other=0)
        row = (first_slot + (word >> 2)) * (2 * SIZE) + OFFSET
        bit = 1 << place
        waits_0 = (held_0 & bit) != 0
        waits_1 = (held_1 & bit) != 0
        mbarrier.wait(free.index(place), (phases_0 >> place) & 1, pred=waits_0)
        mbarrier.wait(free.index(PLACES + place), (phases_1 >> place) & 1, pred=waits_1)
        phases_0 ^= held_0 & bit
        phases_1 ^= held_1 & bit
        sides = word & 3
        held_0 = (held_0 & ~bit) | ((sides & 1) << place)
        held_1 = (held_1 & ~bit) | ((sides >> 1) << place)
        own_ready = ready.index((sides - 1) * PLACES + place)
        mbarrier.expect(own_ready, staging.block_type.nbytes)
        _load(staging, [row, 0], own_ready, buffers.index(place))
        place = gl.where(place + 1 == PLACES, 0, place + 1)
        word = next_word
        next_word = far_word


@gluon.jit
def await_block(word, phases, ready, HALF: gl.constexpr, PLACES: gl.constexpr) -> Any:
    """Wait for a block of this half; returns the phases of the barriers from then on."""
    place = (word >> PLACE) & 15
    is_shared = (word >> _IS_SHARED) & 1
    is_there = (word >> _IS_NONE) & 1 == 0
    at = gl.where(is_shared != 0, 2 * PLACES + place, HALF * PLACES + place)
    bit = place + is_shared * PLACES
    mbarrier.wait(ready.index(at), (phases >> bit) & 1, pred=is_there)
    return phases ^ gl.where(is_there, 1 << bit, 0)


@gluon.jit
def hold(word, phases, ready, HALF: gl.constexpr, PLACES: gl.constexpr) -> None:
    """Await again a block that is there: the assembler lets no wait for products pass before it.

    Else it would begin the softmax by the wait for the sums that are made beside it.
    """
    place = (word >> PLACE) & 15
    is_shared = (word >> _IS_SHARED) & 1
    at = gl.where(is_shared != 0, 2 * PLACES + place, HALF * PLACES + place)
    mbarrier.wait(ready.index(at), (phases >> (place + is_shared * PLACES)) & 1 ^ 1)


@gluon.jit
def free_pair(word_a, word_b, free, HALF: gl.constexpr, PLACES: gl.constexpr) -> None:
    """Free the places of two blocks; the second may be none."""
    mbarrier.arrive(free.index(HALF * PLACES + ((word_a >> PLACE) & 15)), count=1)
    is_there = (word_b >> _IS_NONE) & 1 == 0
    mbarrier.arrive(free.index(HALF * PLACES + ((word_b >> PLACE) & 15)), count=1, pred=is_there)


def list_entries(
    union: Unions, prompt: Prompt, first_tile: int, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """List the entries of unions that either half multiplies.

    Args:
        union: What tiles of `workspace.HALVES_ROWS` rows read.
        prompt: The tokens, with the staging buffer.
        first_tile: Of the union.
        room: Rows of a token, a power of two.

    Returns:
        Words [pairs, tiles, 2, U + 1] int32, of each entry of a half: bits of its readers, then
        from bit 16 on its place in shared memory, whether both halves list it, whether it is
        none, and 1 or 2 for the block of the half's first token and the one behind it. How many
        [pairs, tiles, 2] int32. And [pairs, tiles, U] int32, of each entry of the union: bits of
        the halves that list it, then its slot.
    """
    assert union.counts is not None
    pairs, tiles, num_entries = union.block_ids.shape
    new = union.block_ids.new_empty
    words, own_counts = new((pairs, tiles, 2, num_entries + 1)), new((pairs, tiles, 2))
    brought = new((pairs, tiles, num_entries))
    launch(_list_entries, (tiles, pairs))(
        union.readers, union.counts, union.block_ids, union.slots, prompt.lengths, words,
        own_counts, brought, prompt.slots.shape[1], num_entries, num_entries + 1, first_tile,
        max(64 // room, 1), room > 64, prompt.staging.shape[4], PLACES, _TILE, num_warps=1,
    )  # fmt: skip
    return words, own_counts, brought
