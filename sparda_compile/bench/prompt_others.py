"""What others offer for a prompt's attention, beside our kernels on the same inputs.

    flex_<q>x<k>   FlexAttention, compiled, with the same blocks of each token: tiles of q tokens
                   and k keys of which no token reads anything are passed by, in a tile that all
                   tokens read in full no mask is asked, and elsewhere a bitmap of tokens and blocks
    nsa            `parallel_nsa` of fla-core with the same blocks, in a prompt without a past
    dense_flash    SDPA by FlashAttention over the past and the new tokens up to each one's own
    dense_cudnn    SDPA by cuDNN over the same. torch has its causal mask for as many queries as
                   keys alone: so the past and the new tokens are attended to apart, and joined by
                   their sums of exponentials. Keys are repeated for query heads, before it is timed

Each is compared with fp64 at some tokens before it is timed, and what cannot run, or is off, says
why under `skipped`.
"""

from __future__ import annotations

import dataclasses
import importlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparda_compile.bench.prompt_case import MOST_ERROR, Case
from sparda_compile.bench.refusals import REFUSALS, reason_of
from sparda_compile.bench.timing import Spread, graph_us, time_calls

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Offer = Callable[[Case], tuple[Callable[[], Tensor], dict[str, Any]]]
    Part = Callable[..., tuple[Tensor, Tensor]]

__all__ = [
    "attend_in_parts",
    "bench_others",
    "compiled_flex",
    "flex_mask",
    "token_bitmap",
]

_ROUNDS: Final = 10
# Query tokens of a tile of FlexAttention, and keys: its default, and one block of ours.
_TILES: Final = ((128, 128), (128, 64))
_MASKS: Final = 3
# Shapes and masks that one process compiles FlexAttention for; torch stops at eight.
_MOST_FORMS: Final = 64


def bench_others(case: Case, ours_us: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure what others offer for one number of KV heads.

    Args:
        case: The prompt.
        ours_us: What our attention takes.
        say: Told what is being measured.

    Returns:
        A row for each, by name: its time, `tflops` of the blocks that it has to read, its `error`,
        `ours_us` and `over_ours`, how many times as long it takes; or why it was `skipped`.
    """
    behind_nothing = dataclasses.replace(case.shape, past=0)

    def alone() -> Case:
        return Case(case.query.device, behind_nothing, case.groups)

    def same() -> Case:
        return case

    flex: dict[str, Offer] = {f"flex_{q}x{k}": partial(_flex, tile=(q, k)) for q, k in _TILES}
    offers = [(name, offer, same, ours_us, False) for name, offer in flex.items()]
    offers += [("dense_flash", _flash, same, ours_us, True)]
    offers += [("dense_cudnn", _cudnn, same, ours_us, True)]
    rows: dict[str, Any] = {}
    for name, offer, make, known_us, dense in [*offers, ("nsa", _nsa, alone, None, False)]:
        say(f"{name} with {case.groups} KV heads")
        rows[f"{name}_g{case.groups}"] = _row(offer, make, known_us, dense=dense)
    return rows


def _row(
    offer: Offer, make: Callable[[], Case], ours_us: float | None, *, dense: bool = False
) -> dict[str, Any]:
    """Compare and measure one of them; ours is measured behind it if its time is not known."""
    try:
        case = make()
        call, more = offer(case)
        error = case.error(call(), dense=dense)
        if not error < MOST_ERROR:
            return {"skipped": f"its output is off by {error:.3g}"}
        us = graph_us([call] * 2, _ROUNDS)
    except REFUSALS as refusal:
        return {"skipped": reason_of(refusal)}
    ours = _ours(case) if ours_us is None else ours_us
    flop = case.dense_flop if dense else case.flop
    return {
        **us.to_dict(),
        **more,
        "error": error,
        "tflops": round(flop / us.median / 1e6, 1),
        "ours_us": round(ours, 3),
        "over_ours": round(us.median / ours, 3),
    }


def _ours(case: Case) -> float:
    case.stage()
    error = case.error(case.attend())
    if not error < MOST_ERROR:
        raise AssertionError(f"attention of a prompt without a past is off by {error}")
    return graph_us([case.attend] * 2, _ROUNDS).median


def compiled_flex(scale: float) -> Callable[..., Tensor]:
    """Return FlexAttention, compiled at its first call, of queries, keys, values and a block mask.

    Args:
        scale: Factor on q . k.
    """
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call(query: Tensor, keys: Tensor, values: Tensor, mask: BlockMask | None = None) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=_MOST_FORMS):
            out: Tensor = compiled(
                query,
                keys,
                values,
                scale=scale,
                block_mask=mask,
                enable_gqa=True,
            )
        return out

    return call


def _flex(case: Case, tile: tuple[int, int]) -> tuple[Callable[[], Tensor], dict[str, Any]]:
    mask = flex_mask(case, tile)
    build_us = Spread.of(time_calls(partial(flex_mask, case, tile), _MASKS)).median
    call = partial(compiled_flex(case.factors[0]), case.query, *case.gathered, mask)
    return call, {"mask_us": round(build_us, 1), "sparsity": round(float(mask.sparsity()), 2)}


def token_bitmap(case: Case) -> Tensor:
    """Return which blocks each token reads, [G, T, N] bool."""
    num_blocks = case.table.shape[2]
    ids = case.ids[0].long()
    wanted = ids.new_zeros((*ids.shape[:2], num_blocks + 1), dtype=torch.bool)
    wanted.scatter_(-1, ids.where(ids >= 0, num_blocks), True)
    return wanted[..., :num_blocks].contiguous()


def flex_mask(case: Case, tile: tuple[int, int]) -> BlockMask:
    """Return the mask of a prompt: each token reads its own blocks, up to itself.

    Args:
        case: The prompt.
        tile: Query tokens and keys of a tile; whole blocks of ours.
    """
    shape, bitmap = case.shape, token_bitmap(case)
    heads, past, size = shape.heads // case.groups, shape.past, shape.block
    tokens, blocks = tile[0], tile[1] // size
    rows, columns = triton.cdiv(shape.tokens, tokens), triton.cdiv(bitmap.shape[2], blocks)
    room = (0, columns * blocks - bitmap.shape[2], 0, rows * tokens - shape.tokens)
    tiles = F.pad(bitmap, room).view(case.groups, rows, tokens, columns, blocks)
    first = past + tokens * torch.arange(rows, device=bitmap.device)
    last = tile[1] * torch.arange(1, columns + 1, device=bitmap.device) - 1
    is_full = tiles.all(4).all(2) & (last <= first[:, None])
    is_part = tiles.any(4).any(2) & ~is_full

    def reads(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return bitmap[head // heads, query, key // size] & (key <= query + past)

    return BlockMask.from_kv_blocks(
        *_listed(is_part, heads),
        *_listed(is_full, heads),
        BLOCK_SIZE=tile,
        mask_mod=reads,
        seq_lengths=(shape.tokens, past + shape.tokens),
    )


def _listed(wanted: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return counts [1, H, rows] and, first in each row, the columns [1, H, rows, columns]."""
    order = wanted.byte().argsort(stable=True, dim=-1, descending=True).int()
    each = wanted.sum(-1).int(), order
    counts, columns = (tensor.repeat_interleave(heads, 0)[None] for tensor in each)
    return counts, columns


def _flash(case: Case) -> tuple[Callable[[], Tensor], dict[str, Any]]:
    keys, values = case.gathered
    bias = causal_lower_right(case.shape.tokens, keys.shape[2])

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(
                case.query, keys, values, attn_mask=bias, scale=case.factors[0], enable_gqa=True
            )

    return call, {}


def _cudnn(case: Case) -> tuple[Callable[[], Tensor], dict[str, Any]]:
    heads, past = case.shape.heads // case.groups, case.shape.past
    repeated = [each.repeat_interleave(heads, 1) for each in case.gathered]
    old, new = ([each[:, :, at] for each in repeated] for at in (slice(past), slice(past, None)))

    def part(
        query: Tensor, keys: Tensor, values: Tensor, *, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, keys, values, None, True, 0.0, is_causal, False, scale=case.factors[0]
        )
        return out, lse.reshape(query.shape[:3])

    return partial(attend_in_parts, part, case.query, old, new), {}


def attend_in_parts(part: Part, query: Tensor, old: list[Tensor], new: list[Tensor]) -> Tensor:
    """Attend to keys before all queries and, causally, to keys beside them; returns [1, H, T, D].

    Args:
        part: Given queries, keys, values and `is_causal`: attention, and the logarithm of the sum
            of exponentials of each row, [1, H, T].
        query: [1, H, T, D].
        old: Keys and values, [1, H, S, D].
        new: Keys and values, [1, H, T, D].
    """
    before, before_lse = part(query, *old, is_causal=False)
    beside, beside_lse = part(query, *new, is_causal=True)
    share = (before_lse - beside_lse).sigmoid()[..., None]
    return torch.lerp(beside.float(), before.float(), share).to(query.dtype)


def _nsa(case: Case) -> tuple[Callable[[], Tensor], dict[str, Any]]:
    # By name: it is measured where somebody has installed it, and nothing else needs it.
    parallel_nsa = importlib.import_module("fla.ops.nsa").parallel_nsa
    query, keys, values, ids = (
        each.transpose(1, 2).contiguous() for each in (case.query, *case.kv, case.ids.long())
    )
    selected, size = ids.shape[-1], case.shape.block

    def call() -> Tensor:
        out: Tensor = parallel_nsa(
            query,
            keys,
            values,
            block_indices=ids,
            block_counts=selected,
            block_size=size,
            scale=case.factors[0],
        )
        return out.transpose(1, 2)

    return call, {}
