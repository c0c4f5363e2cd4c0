"""How much there is in a union: of the blocks that a tile of a prompt's tokens reads."""

from __future__ import annotations

__all__ = ["mark_words", "union_entries", "union_words", "unions_bytes"]


def union_entries(num_blocks: int, tokens: int, selected: int) -> int:
    """Return the most blocks that a tile of tokens reads, of K each."""
    return min(num_blocks, tokens * selected)


def union_words(tokens: int) -> int:
    """Return the words of 32 bits that hold a bit for each token of a tile, a power of two."""
    return 1 << (-(-tokens // 32) - 1).bit_length()


def mark_words(num_blocks: int, tokens: int) -> int:
    """Return the words of 32 bits that hold a bit for each block and token of a tile.

    Args:
        num_blocks: N.
        tokens: Of the tile, a power of two.
    """
    return -(-num_blocks * min(tokens, 32) // 32) * union_words(tokens)


def unions_bytes(num_blocks: int, tokens: int, selected: int) -> int:
    """Return the bytes that one tile and pair take: of `gpu.token_blocks.Unions`, and its marks."""
    entries = union_entries(num_blocks, tokens, selected)
    return entries * (8 + 4 * union_words(tokens)) + 4 * mark_words(num_blocks, tokens) + 4
