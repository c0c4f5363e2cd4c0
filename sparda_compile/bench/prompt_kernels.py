"""Kernels of a prompt alone: 16K new tokens of one sequence behind 128K others.

    select_forecast, select_infllm2   the blocks of each token
    stage                             the past blocks that they read, from device pages
    attend                            attention over them: the op as it is called, and its two large
                                      kernels by rows of a tile

Floors: FLOP that nobody can save, at the rate of a large matrix product, or bytes that have to be
read or written once, at the rate of a copy, whichever takes longer. Selection counts the products
with pooled keys, twice for a softmax; attention counts those of each token's own blocks, of which a
block that the token is in counts as whole. A token replaces a tenth of the blocks that are scored
of the token before it: random weights say nothing of what models read. Results are compared before
anything is timed.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.bench.calibration import matmul_tflops
from sparda_compile.bench.timing import graph_us
from sparda_compile.kernels.gpu import attend_tokens, select_tokens, stage, token_blocks
from sparda_compile.kernels.gpu.select import Choice
from sparda_compile.kernels.prefill_attention import num_new_slots
from sparda_compile.kernels.select_blocks import select_blocks_reference
from sparda_compile.runtime.staging import empty_staging
from sparda_compile.selectors import SELECTORS, Geometry

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["Shape", "bench_prompt"]

# KV heads: of 32 query heads, groups of 16 and of 4.
_GROUPS: Final = (2, 8)
# Tokens after which a scored block is replaced: neighbours share nine tenths.
_KEPT: Final = 10
_SAMPLE: Final = 8
_ROUNDS: Final = 10


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of what is measured.

    Attributes:
        tokens: T, new tokens.
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


def bench_prompt(
    device: torch.device,
    rate: float,
    say: Callable[[str], None],
    shape: Shape | None = None,
) -> dict[str, Any]:
    """Measure selection and attention for groups of 16 and of 4.

    Args:
        device: A CUDA device.
        rate: Its memory's bandwidth, 10^9 bytes per second.
        say: Told what is being measured.
        shape: Sizes; a test has smaller ones.
    """
    shape = shape or Shape()
    say("matrix multiplication")
    rates = (matmul_tflops(device), rate)
    rows: dict[str, Any] = {}
    for groups in _GROUPS:
        say(f"a prompt with {groups} KV heads")
        for selector in ("forecast", "infllm2"):
            rows[f"select_{selector}_g{groups}"] = _select(device, shape, groups, selector, rates)
        rows.update(_attend(device, shape, groups, rates))
    return {
        "tokens": shape.tokens,
        "past": shape.past,
        "matmul_tflops": rates[0],
        "kept_by_a_neighbour": 1 - 1 / _KEPT,
        "kernels": rows,
    }


def _row(
    calls: list[Callable[[], object]], flop: float, num_bytes: float, rates: tuple[float, float]
) -> dict[str, Any]:
    us = graph_us(calls, _ROUNDS)
    tflops = flop / us.median / 1e6
    by = {"flop": flop / rates[0] / 1e6, "bytes": num_bytes / rates[1] / 1e3}
    return {
        **us.to_dict(),
        "floor_us": round(max(by.values()), 1),
        "floors_us": {name: round(value, 1) for name, value in by.items()},
        "tflops": round(tflops, 1),
        "of_matmul": round(tflops / rates[0], 3),
    }


def _randn(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=device)


def _select(
    device: torch.device, shape: Shape, groups: int, selector: str, rates: tuple[float, float]
) -> dict[str, Any]:
    geometry, choice = shape.geometry, Choice(shape.selected, shape.block, shape.sink, shape.local)
    heads = groups if selector == "forecast" else shape.heads
    position = torch.arange(shape.past, shape.past + shape.tokens, device=device).int()[None]
    pooled = _randn(device, 1, groups, geometry.num_windows, shape.dim)
    scale = shape.dim**-0.5
    query = _randn(device, 1, heads, shape.tokens, shape.dim)
    lengths = torch.full((1,), shape.past, dtype=torch.int32, device=device)
    asked = select_tokens.Asked(
        query, [pooled], position, lengths, shape.past, selector, scale, geometry
    )
    ids = position.new_empty((1, groups, shape.tokens, shape.selected))
    call = partial(select_tokens.select_tokens, asked, choice, ids)
    call()
    sample = torch.linspace(0, shape.tokens - 1, _SAMPLE, device=device).long()
    summary = [pooled.expand(_SAMPLE, -1, -1, -1)]
    scores = SELECTORS[selector].score(
        query[0].transpose(0, 1)[sample][:, :, None], summary, position[0, sample], scale, geometry
    )
    want = select_blocks_reference(scores, position[0, sample], *choice)
    got = ids[0].transpose(0, 1)[sample]
    same = float((got[..., None] == want[:, :, None]).any(-1).float().mean())
    if not same > 0.98:  # sums of products in another order may exchange blocks that are close
        raise AssertionError(f"selection agrees in {same} of the blocks")
    passes = 1 if selector == "forecast" else 2
    windows = (shape.past + shape.tokens / 2) / geometry.pool_stride
    flop = 2.0 * passes * shape.tokens * heads * windows * shape.dim
    num_bytes = 2 * (query.numel() + pooled.numel()) + 4 * ids.numel()
    return {**_row([call] * 2, flop, num_bytes, rates), "same_blocks": round(same, 4)}


def _block_ids(device: torch.device, shape: Shape, groups: int) -> Tensor:
    """Return [1, G, T, K] blocks, ascending, of which neighbours share nine tenths of the scored.

    Each scored block of a token is drawn from a range of its own, again every tenth token.
    """
    token = torch.arange(shape.tokens, device=device)[:, None]
    current = shape.past // shape.block + token // shape.block
    entry = torch.arange(shape.scored, device=device)
    width = (shape.past // shape.block - shape.local - shape.sink) // shape.scored
    times = (shape.tokens + _KEPT) // _KEPT + 1
    drawn = torch.randint(0, width, (groups, times, shape.scored), device=device)
    chosen = drawn[:, (token + entry) // _KEPT % times, entry] + shape.sink + entry * width
    sink = torch.arange(shape.sink, device=device).expand(groups, shape.tokens, -1)
    local = current + torch.arange(-shape.local, 1, device=device)
    return torch.cat([sink, chosen, local.expand(groups, -1, -1)], -1).int()[None]


def _attend(
    device: torch.device, shape: Shape, groups: int, rates: tuple[float, float]
) -> dict[str, Any]:
    """Return rows of the op, and for tiles of 64 and 128 rows of the union and of attention."""
    num_blocks, past_blocks = shape.geometry.num_blocks, shape.past // shape.block
    kv = (
        _randn(device, 1, groups, shape.tokens, shape.dim),
        _randn(device, 1, groups, shape.tokens, shape.dim),
    )
    query = _randn(device, 1, shape.heads, shape.tokens, shape.dim)
    pages = _randn(device, 1, groups, past_blocks, 2, shape.block, shape.dim)
    block = torch.arange(num_blocks, device=device)
    table = block.where(block < past_blocks, -1).int().expand(1, groups, -1).contiguous()
    host = torch.empty(0, dtype=torch.int64, device=device)
    ids = _block_ids(device, shape, groups)
    lengths = torch.full((1,), shape.past, dtype=torch.int32, device=device)
    columns = torch.arange(shape.tokens, dtype=torch.int32, device=device)[None]
    numbered = (columns + shape.past, columns, lengths + shape.tokens)
    factors = (shape.dim**-0.5, 0.0)
    staging, slots = empty_staging(ids, pages, table, shape.past)
    room = staging.shape[2] - num_new_slots(shape.tokens, shape.block)
    copy = partial(stage.stage, ids, lengths, (pages, host, table), staging, slots, room)
    copy()
    staged, paged = (staging, slots), (pages, table)
    call = partial(
        attend_tokens.attend_tokens, query, kv, ids, numbered, lengths, staged, paged, factors
    )
    error = _error(call(), query, torch.stack(kv, 3), pages, ids, shape)
    if not error < 1e-2:
        raise AssertionError(f"attention of a prompt is off by {error}")
    flop = 4.0 * shape.tokens * shape.heads * shape.selected * shape.block * shape.dim
    num_bytes = 2.0 * (2 * query.numel() + 2 * kv[0].numel() + pages.numel()) + 4 * ids.numel()
    rows = {f"attend_g{groups}": {**_row([call] * 2, flop, num_bytes, rates), "error": error}}
    copied = 2.0 * 2 * pages.numel()
    rows[f"stage_g{groups}"] = _row([copy] * 2, 0.0, copied + 4 * ids.numel(), rates)
    prompt = token_blocks.pack_prompt(kv, numbered, lengths, staged, paged)
    out = torch.empty_like(query)
    for lines in (64, 128):
        tokens = lines * groups // shape.heads
        at = (ids, tokens, 0, -(-shape.tokens // tokens))
        find = partial(token_blocks.unions, prompt, *at)
        union = find()
        attend = partial(attend_tokens.attend_unions, query, prompt, union, out, 0, factors, lines)
        assert union.counts is not None
        found = float(union.counts.float().mean())
        name = f"g{groups}_rows_{lines}"
        rows[f"attend_{name}"] = {**_row([attend] * 2, flop, num_bytes, rates), "union": found}
        moved = 4.0 * ids.numel() + 12.0 * float(union.counts.sum())
        rows[f"unions_{name}"] = _row([find] * 2, 0.0, moved, rates)
    return rows


def _error(
    out: Tensor, query: Tensor, kv: Tensor, pages: Tensor, ids: Tensor, shape: Shape
) -> float:
    """Return the relative error of some tokens against fp64 over their own blocks.

    Args:
        out: [1, H, T, D].
        query: [1, H, T, D].
        kv: [1, G, T, 2, D] new keys and values.
        pages: [1, G, C, 2, P, D], block by block.
        ids: [1, G, T, K].
        shape: Sizes.
    """
    groups = pages.shape[1]
    new = kv[0].unflatten(1, (-1, shape.block)).transpose(2, 3)
    got, want = [], []
    for token in torch.linspace(0, shape.tokens - 1, _SAMPLE).long().tolist():
        position = shape.past + token
        for group in range(groups):
            own = ids[0, group, token].long()
            old = own[own < pages.shape[2]]
            blocks = [pages[0, group, old], new[group, own[len(old) :] - pages.shape[2]]]
            keys, values = torch.cat(blocks).double().transpose(0, 1).flatten(1, 2)
            places = own[:, None] * shape.block + torch.arange(shape.block, device=own.device)
            heads = slice(group * shape.heads // groups, (group + 1) * shape.heads // groups)
            scores = query[0, heads, token].double() @ keys.T * shape.dim**-0.5
            scores = scores.masked_fill((places > position).flatten(), float("-inf"))
            want.append(scores.softmax(-1) @ values)
            got.append(out[0, heads, token].double())
    exact = torch.stack(want)
    return float((torch.stack(got) - exact).norm() / exact.norm())
