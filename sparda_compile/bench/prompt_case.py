"""A prompt's attention with made-up content: new tokens, a past on pages, and blocks of each token.

A token replaces a tenth of the blocks that are scored of the token before it: random weights say
nothing of what models read. Behind a past these blocks are drawn from it; without one from what is
before a token, which then reads all of that while it is less.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.kernels.gpu import attend_tokens, stage
from sparda_compile.kernels.paged import num_new_slots
from sparda_compile.runtime.staging import empty_staging
from sparda_compile.selectors import Geometry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KEPT", "MOST_ERROR", "Case", "Shape", "draw_block_ids", "randn"]

# Tokens after which a scored block is replaced: neighbours share nine tenths.
KEPT: Final = 10
# Of the norm of attention's outputs, in bf16 against fp64.
MOST_ERROR: Final = 1e-2
_SAMPLE: Final = 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of what is measured.

    Attributes:
        tokens: T, new tokens, whole blocks.
        past: Tokens before them, whole blocks.
        heads: Query heads.
        block: P.
        dim: D.
        sink: Always-kept first blocks.
        local: Always-kept blocks before a token's own.
        scored: Other blocks that a token reads.
    """

    tokens: int = 16384
    past: int = 131072
    heads: int = 32
    block: int = 64
    dim: int = 128
    sink: int = 1
    local: int = 32
    scored: int = 62

    @property
    def selected(self) -> int:
        """K, the current block among them."""
        return self.sink + self.local + 1 + self.scored

    @property
    def geometry(self) -> Geometry:
        """Sizes of scores."""
        half = self.block // 2
        return Geometry((self.past + self.tokens) // self.block, self.block, half, half // 2)


def randn(device: torch.device, *shape: int) -> Tensor:
    """Return random numbers, bf16."""
    return torch.randn(*shape, dtype=torch.bfloat16, device=device)


def draw_block_ids(device: torch.device, shape: Shape, groups: int) -> Tensor:
    """Return [1, G, T, K] int32 blocks, ascending, then -1.

    Neighbours share nine tenths of the scored ones: each of a token's is drawn from a range of its
    own, again every tenth token.
    """
    token = torch.arange(shape.tokens, device=device)[:, None]
    current = (shape.past + token) // shape.block
    entry = torch.arange(shape.scored, device=device)
    ahead = torch.full_like(token, shape.past // shape.block) if shape.past else current
    free = (ahead - shape.local - shape.sink).clamp(min=0)
    begin = entry * free // shape.scored
    width = (entry + 1) * free // shape.scored - begin
    times = (shape.tokens + KEPT) // KEPT + 1
    drawn = torch.rand((groups, times, shape.scored), device=device)
    place = (drawn[:, (token + entry) // KEPT % times, entry] * width).long().minimum(width - 1)
    chosen = (shape.sink + begin + place).where(width > 0, -1)
    sink = torch.arange(shape.sink, device=device).expand(shape.tokens, -1)
    local = current + torch.arange(-shape.local, 1, device=device)
    always = sink.where(sink <= current, -1), local.where(local >= shape.sink, -1)
    parts = [each.expand(groups, -1, -1) for each in always]
    ids = torch.cat([parts[0], chosen, parts[1]], -1)
    behind_all = torch.iinfo(ids.dtype).max
    ids = ids.where(ids >= 0, behind_all).sort(-1).values
    return ids.where(ids < behind_all, -1).int()[None]


class Case:
    """One prompt's attention.

    Args:
        device: Where it is.
        shape: Sizes.
        groups: G, KV heads.

    Attributes:
        query: [1, H, T, D].
        kv: [1, G, T, D] new keys, and new values.
        pages: [1, G, C, 2, P, D], block by block.
        table: [1, G, N] int32, where each block is.
        ids: [1, G, T, K] int32, the blocks of each token.
        lengths: [1] int32, the past.
        numbered: Positions [1, T], columns [1, T] and totals [1], int32.
        factors: Factor on q . k, and no soft cap.
        staged: The buffer of past blocks, and slots in it.
    """

    def __init__(self, device: torch.device, shape: Shape, groups: int) -> None:
        self.shape = shape
        self.groups = groups
        past_blocks = shape.past // shape.block
        size = (1, groups, shape.tokens, shape.dim)
        self.kv = (randn(device, *size), randn(device, *size))
        self.query = randn(device, 1, shape.heads, shape.tokens, shape.dim)
        num_pages = max(past_blocks, 1)
        self.pages = randn(device, 1, groups, num_pages, 2, shape.block, shape.dim)
        block = torch.arange(shape.geometry.num_blocks, device=device)
        table = block.where(block < past_blocks, -1).int()
        self.table = table.expand(1, groups, -1).contiguous()
        self.ids = draw_block_ids(device, shape, groups)
        self.lengths = torch.full((1,), shape.past, dtype=torch.int32, device=device)
        columns = torch.arange(shape.tokens, dtype=torch.int32, device=device)[None]
        self.numbered = (columns + shape.past, columns, self.lengths + shape.tokens)
        self.factors = (shape.dim**-0.5, 0.0)
        self.staged = empty_staging(self.ids, self.pages, self.table, shape.past)

    @property
    def flop(self) -> float:
        """FLOP of each token's own blocks; one that the token is in counts as whole."""
        per_block = 4.0 * self.shape.heads // self.groups * self.shape.block * self.shape.dim
        return per_block * float((self.ids >= 0).sum())

    @property
    def dense_flop(self) -> float:
        """FLOP of all keys up to each token's own."""
        shape = self.shape
        keys = shape.tokens * shape.past + shape.tokens * (shape.tokens + 1) / 2
        return 4.0 * shape.heads * shape.dim * keys

    def stage(self) -> None:
        """Copy the past blocks that are read to the buffer."""
        staging, slots = self.staged
        room = staging.shape[2] - num_new_slots(self.shape.tokens, self.shape.block)
        host = torch.empty(0, dtype=torch.int64, device=self.query.device)
        if room:
            past = (self.pages, host, self.table)
            stage.stage(self.ids, self.lengths, past, staging, slots, room)

    def attend(self) -> Tensor:
        """Call the op's kernels on what `stage` left; returns [1, H, T, D]."""
        paged = (self.pages, self.table)
        tokens = (self.ids, self.numbered, self.lengths)
        return attend_tokens.attend_tokens(
            self.query, self.kv, *tokens, self.staged, paged, self.factors
        )

    @cached_property
    def gathered(self) -> tuple[Tensor, Tensor]:
        """All keys, and all values, past and new ones in a row, [1, G, S, D]."""
        old = self.pages[:, :, : self.shape.past // self.shape.block].unbind(3)
        pairs = zip(old, self.kv, strict=True)
        keys, values = (torch.cat([past.flatten(2, 3), new], 2) for past, new in pairs)
        return keys, values

    def error(self, out: Tensor, *, dense: bool = False) -> float:
        """Return the relative error of some tokens against fp64 over their own blocks.

        Args:
            out: [1, H, T, D].
            dense: Whether they read all blocks up to their own instead.
        """
        shape, heads = self.shape, self.shape.heads // self.groups
        got, want = [], []
        for token in torch.linspace(0, shape.tokens - 1, _SAMPLE).long().tolist():
            position = shape.past + token
            for group in range(self.groups):
                own = self.ids[0, group, token].long()
                own = own[own >= 0]
                if dense:
                    own = torch.arange(position // shape.block + 1, device=own.device)
                places = own[:, None] * shape.block + torch.arange(shape.block, device=own.device)
                places = places.flatten()
                places = places[places <= position]
                keys, values = (each[0, group, places].double() for each in self.gathered)
                mine = slice(group * heads, (group + 1) * heads)
                scores = self.query[0, mine, token].double() @ keys.T * self.factors[0]
                want.append(scores.softmax(-1) @ values)
                got.append(out[0, mine, token].double())
        exact = torch.stack(want)
        return float((torch.stack(got) - exact).norm() / exact.norm())
