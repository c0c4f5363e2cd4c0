"""Data of one layer's decode steps, with selections and predictions that share a stated part.

    selected     what a selector finds by itself: the pooled keys of the scored blocks of step t lie
                 along a direction of their own, u_t, and so do the queries of that step
    overlap      share of the scored blocks of a step that the step before read too
    predicted    blocks that hold a stated share of what a step reads, and others up to a budget
    layers       as many copies with other content as the L2 cache cannot hold: in a model, all
                 other layers are read between two steps of one

The cache has room for a block more than is full, and the new token is the last of its block: so no
program needs a mask, and every one of torch's attentions may be asked. Sink, local and current
blocks are read in every step, and are always predicted.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.bench.synthetic import draw_steps
from sparda_compile.selectors import Geometry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MOST_ERROR",
    "DecodeShape",
    "PrrCase",
    "PrrLayer",
    "attend_exactly",
    "error_of",
    "listed",
]

# Of the norm of attention's outputs, in bf16 against fp64.
MOST_ERROR: Final = 5e-3
# Of a pooled key along the direction of its step; other logits are about 1.
_LIFT: Final = 16.0
_NOISE: Final = 0.25
_L2_BYTES: Final = 160 << 20
_MOST_LAYERS: Final = 16
_MOST_SUMMARIES: Final = 160


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """Sizes of what is measured.

    Attributes:
        tokens: That the cache has room for, whole blocks; all but the last one are full.
        batch: Sequences.
        heads: Query heads.
        groups: KV heads.
        dim: D.
        block: P.
        pool: Tokens of a pooled key; the next one begins half as many later.
        sink: Always-kept first blocks.
        local: Always-kept blocks before the current one.
        scored: Other blocks that a step reads.
        overlap: Share of the scored blocks that the step before read too.
        steps: Steps with selections of their own, fewer than D.
        attends: Whether there are keys and values; a selection alone needs none.
    """

    tokens: int = 131072
    batch: int = 1
    heads: int = 32
    groups: int = 2
    dim: int = 128
    block: int = 64
    pool: int = 32
    sink: int = 1
    local: int = 32
    scored: int = 62
    overlap: float = 0.9
    steps: int = 4
    attends: bool = True

    @property
    def selected(self) -> int:
        """K, the current block among them."""
        return self.sink + self.local + 1 + self.scored

    @property
    def current(self) -> int:
        """The block of the new token, which is full with it."""
        return self.tokens // self.block - 2

    @property
    def geometry(self) -> Geometry:
        """Sizes of scores."""
        return Geometry(self.tokens // self.block, self.block, self.pool, self.pool // 2)

    @property
    def num_windows(self) -> int:
        """Pooled keys that the tokens before the new one have completed."""
        past = (self.current + 1) * self.block - 1
        return (past - self.pool) // self.geometry.pool_stride + 1

    @property
    def block_bytes(self) -> int:
        """Keys and values of a block of all sequences and KV heads, bf16."""
        return self.batch * self.groups * 2 * self.block * self.dim * 2

    @property
    def pooled_bytes(self) -> int:
        """Pooled keys that a selection reads."""
        return self.batch * self.groups * self.num_windows * self.dim * 2

    @property
    def layers(self) -> int:
        """Copies of everything, so that a step finds nothing of its layer in the L2 cache."""
        read = self.pooled_bytes + self.attends * self.selected * self.block_bytes
        most = _MOST_LAYERS if self.attends else _MOST_SUMMARIES
        return max(2, min(most, math.ceil(_L2_BYTES / read)))

    @property
    def num_bytes(self) -> int:
        """Device memory of all layers, roughly."""
        blocks = self.attends * self.tokens // self.block
        return self.layers * (blocks * self.block_bytes + 2 * self.pooled_bytes)


@dataclasses.dataclass(frozen=True)
class PrrLayer:
    """One layer's cache and what its steps are to find there.

    Attributes:
        pages: [B, G, N, 2, P, D] bf16; page n holds block n. Empty if nothing attends.
        pooled: [B, G, W, D] bf16.
        tables: [B, G, N] int32 each: the page of a block, the block of a page, and its stamp.
        level: [B, G, N] float32, of the predictor.
        trend: [B, G, N] float32.
        queries: [B, H, 1, D] bf16, one for each step.
        before: [B, G, N] bool, what the step before the first read.
        reads: [B, G, N] bool, what each step reads.
    """

    pages: Tensor
    pooled: Tensor
    tables: tuple[Tensor, Tensor, Tensor]
    level: Tensor
    trend: Tensor
    queries: list[Tensor]
    before: Tensor
    reads: list[Tensor]

    @cached_property
    def ids(self) -> list[Tensor]:
        """What each step reads, [B, G, K] int32, ascending."""
        return [listed(each) for each in self.reads]

    def last(self, step: int) -> Tensor:
        """Return what the step before another read, [B, G, N] bool."""
        return self.reads[step - 1] if step else self.before


class PrrCase:
    """Layers of one shape.

    Args:
        device: Where they are.
        shape: Sizes.

    Attributes:
        layers: As many as the shape says.
        lengths: [B] int32, position of the new token.
        counters: int64, as ops update them.
        scale: Factor on q . k.
    """

    def __init__(self, device: torch.device, shape: DecodeShape) -> None:
        self.shape, self.device = shape, device
        self.scale = shape.dim**-0.5
        last = (shape.current + 1) * shape.block - 1
        self.lengths = torch.full((shape.batch,), last, dtype=torch.int32, device=device)
        self.counters = torch.zeros(6, dtype=torch.int64, device=device)
        self.layers = [self._layer(seed) for seed in range(shape.layers)]

    def _layer(self, seed: int) -> PrrLayer:
        shape, geometry = self.shape, self.shape.geometry
        random = torch.Generator(device=self.device).manual_seed(seed)
        pair, blocks = (shape.batch, shape.groups), geometry.num_blocks

        def made(*size: int) -> Tensor:
            empty = torch.empty(size, dtype=torch.bfloat16, device=self.device)
            return empty.normal_(generator=random)

        first, end = shape.sink, shape.current - shape.local
        kept = round(shape.overlap * shape.scored)
        reads = []
        drawn = draw_steps((*pair, end - first), shape.scored, kept, shape.steps + 1, random)
        for picked in drawn:
            wanted = torch.zeros(*pair, blocks, dtype=torch.bool, device=self.device)
            wanted[..., : shape.sink] = wanted[..., end : shape.current + 1] = True
            wanted[..., first:end] = picked
            reads.append(wanted)
        square = torch.randn(shape.dim, shape.dim, generator=random, device=self.device)
        directions = torch.linalg.qr(square).Q[: shape.steps]
        pooled = made(*pair, geometry.num_windows, shape.dim)
        for wanted, along in zip(reads[1:], directions, strict=True):
            pooled += _LIFT * self._inside(wanted) * along.to(pooled.dtype)
        noise = [made(shape.batch, shape.heads, 1, shape.dim) for _ in directions]
        queries = [
            (_NOISE * other + shape.dim**0.5 * along).to(pooled.dtype)
            for other, along in zip(noise, directions, strict=True)
        ]
        ids = torch.arange(blocks, dtype=torch.int32, device=self.device)
        level = torch.rand(*pair, blocks, generator=random, device=self.device)
        return PrrLayer(
            pages=made(*pair, blocks if shape.attends else 0, 2, shape.block, shape.dim),
            pooled=pooled,
            tables=tuple(ids.expand(*pair, -1).contiguous() for _ in range(3)),  # type: ignore[arg-type]
            level=level,
            trend=torch.zeros_like(level),
            queries=queries,
            before=reads[0],
            reads=reads[1:],
        )

    def _inside(self, wanted: Tensor) -> Tensor:
        """Return [B, G, W, 1] bool: windows that lie in wanted blocks and touch no other."""
        geometry = self.shape.geometry
        ratio = geometry.block_size // geometry.pool_stride
        first = torch.arange(ratio, device=wanted.device) * geometry.pool_stride
        fits = first + geometry.pool_size <= geometry.block_size
        windows = (wanted[..., None] & fits).flatten(2)
        return windows[..., : geometry.num_windows, None]

    def predict(self, layer: PrrLayer, step: int, budget: int, coverage: float) -> Tensor:
        """Return [B, G, W] int32 blocks, ascending, then -1, that hold a share of what is read.

        Args:
            layer: One of `layers`.
            step: Which step.
            budget: W, most blocks in all, the current one among them.
            coverage: Share of the blocks that are read, the current one aside, which nobody can
                attend to early. Sink and local blocks are in it in any case.
        """
        shape, reads = self.shape, layer.reads[step]
        forced = shape.sink + shape.local
        hits = round(coverage * (shape.selected - 1)) - forced
        hits = max(0, min(hits, shape.scored, budget - forced - 1))
        scored = torch.zeros_like(reads)
        scored[..., shape.sink : shape.current - shape.local] = True
        others = int((scored[0, 0] & ~reads[0, 0]).sum())
        wrong = min(budget - forced - 1 - hits, others)
        random = torch.Generator(device=self.device).manual_seed(step)
        order = torch.rand(reads.shape, generator=random, device=self.device)
        wanted = reads & ~scored
        for count, among in ((hits, scored & reads), (wrong, scored & ~reads)):
            best = order.masked_fill(~among, -1.0).topk(count).indices
            wanted.scatter_(-1, best, True)
        return listed(wanted, budget)


def listed(wanted: Tensor, width: int | None = None) -> Tensor:
    """Return the blocks that are marked, [B, G, width] int32, ascending, then -1.

    Args:
        wanted: [B, G, N] bool, as many of each pair of sequence and KV head.
        width: Columns; None for as many as are marked.
    """
    ids = wanted.nonzero()[:, 2].view(*wanted.shape[:2], -1).int()
    room = 0 if width is None else width - ids.shape[2]
    return torch.nn.functional.pad(ids, (0, room), value=-1).contiguous()


def attend_exactly(query: Tensor, pages: Tensor, ids: Tensor, scale: float) -> Tensor:
    """Return attention over whole blocks, in fp64: [B, H, 1, D].

    Args:
        query: [B, H, 1, D].
        pages: [B, G, N, 2, P, D]; page n holds block n.
        ids: [B, G, K], -1 for none.
        scale: Factor on q . k.
    """
    groups = torch.arange(ids.shape[1], device=ids.device)[:, None]
    rows = []
    for row, chosen in enumerate(ids.long()):
        keys, values = pages[row][groups, chosen.clamp(min=0)].double().unbind(2)
        queries = query[row, :, 0].double().unflatten(0, (len(chosen), -1))
        scores = torch.einsum("grd,gkpd->grkp", queries, keys) * scale
        scores = scores.masked_fill((chosen < 0)[:, None, :, None], -math.inf)
        weights = scores.flatten(2).softmax(-1).view_as(scores)
        rows.append(torch.einsum("grkp,gkpd->grd", weights, values).flatten(0, 1))
    return torch.stack(rows)[:, :, None]


def error_of(out: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over that of the exact result."""
    return float((out.double() - exact).norm() / exact.norm())
