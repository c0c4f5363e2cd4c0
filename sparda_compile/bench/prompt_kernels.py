"""Kernels of a prompt alone: 16K new tokens of one sequence behind 128K others.

    select_...                        the blocks of each token, by a Forecast or a query
    stage                             the past blocks that they read, from device pages
    attend                            attention over them: the op as it is called, and its two large
                                      kernels by rows of a tile
    published                         the op at the sizes of the row that InfLLM-V2 published
    others                            what others offer for the same: `prompt_others.py`

Floors: FLOP that nobody can save, at the rate of a large matrix product, or bytes that have to be
read or written once, at the rate of a copy, whichever takes longer. Selection counts the products
with pooled keys, twice for a softmax, or once with the key of every token; attention counts those
of each token's own blocks, of which a block that the token is in counts as whole. `prompt_case.py`
says which blocks those are. Results are compared before anything is timed.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.bench.prompt_case import KEPT, MOST_ERROR, Case, Shape, randn
from sparda_compile.bench.prompt_others import bench_others
from sparda_compile.bench.timing import graph_us, matmul_tflops
from sparda_compile.kernels.gpu import attend_tokens, select_tokens, token_blocks
from sparda_compile.kernels.gpu.select import Choice
from sparda_compile.kernels.select_blocks import select_blocks_reference
from sparda_compile.selectors import SELECTORS
from sparda_compile.selectors.base import empty_summary

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["bench_prompt"]

# InfLLM-V2 (arXiv 2509.24663): two sequences of 128K tokens, 32 query heads on 2 KV heads, 64
# blocks a token, the forward of one layer in 158.42 ms on an H100.
_PUBLISHED_US: Final = 158420.0
_PUBLISHED_SCORED: Final = 30
# KV heads: of 32 query heads, groups of 16 and of 4.
_GROUPS: Final = (2, 8)
# By pooled keys, and by those of every token in 2 bits.
_SELECTORS: Final = ("forecast", "infllm2", "lowbit2_forecast", "lowbit2")
_SAMPLE: Final = 8
_ROUNDS: Final = 10


def bench_prompt(
    device: torch.device,
    rate: float,
    say: Callable[[str], None],
    shape: Shape | None = None,
) -> dict[str, Any]:
    """Measure selection and attention for groups of 16 and of 4, and what others offer.

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
    cases = []
    for groups in _GROUPS:
        say(f"a prompt with {groups} KV heads")
        for selector in _SELECTORS:
            rows[f"select_{selector}_g{groups}"] = _select(device, shape, groups, selector, rates)
        cases.append(Case(device, shape, groups))
        rows.update(_attend(cases[-1], rates))
    say("a published row")
    rows["attend_published"] = _published(device, shape, rates)
    others: dict[str, Any] = {}
    for case in cases:  # at the end, since a kernel of theirs that fails may take the device along
        others.update(bench_others(case, rows[f"attend_g{case.groups}"]["median"], say))
    return {
        "tokens": shape.tokens,
        "past": shape.past,
        "matmul_tflops": rates[0],
        "kept_by_a_neighbour": 1 - 1 / KEPT,
        "kernels": rows,
        "others": others,
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


def _select(
    device: torch.device, shape: Shape, groups: int, selector: str, rates: tuple[float, float]
) -> dict[str, Any]:
    geometry, choice = shape.geometry, Choice(shape.selected, shape.block, shape.sink, shape.local)
    heads = groups if selector.endswith("forecast") else shape.heads
    position = torch.arange(shape.past, shape.past + shape.tokens, device=device).int()[None]
    summary = _summary(device, shape, groups, selector)
    scale = shape.dim**-0.5
    query = randn(device, 1, heads, shape.tokens, shape.dim)
    lengths = torch.full((1,), shape.past, dtype=torch.int32, device=device)
    asked = select_tokens.Asked(
        query, summary, position, lengths, shape.past, selector, scale, geometry
    )
    ids = position.new_empty((1, groups, shape.tokens, shape.selected))
    call = partial(select_tokens.select_tokens, asked, choice, ids)
    call()
    sample = torch.linspace(0, shape.tokens - 1, _SAMPLE, device=device).long()
    scores = SELECTORS[selector].score(
        query[0].transpose(0, 1)[sample][:, :, None],
        [tensor.expand(_SAMPLE, *tensor.shape[1:]) for tensor in summary],
        position[0, sample],
        scale,
        geometry,
    )
    want = select_blocks_reference(scores, position[0, sample], *choice)
    got = ids[0].transpose(0, 1)[sample]
    same = float((got[..., None] == want[:, :, None]).any(-1).float().mean())
    if not same > 0.98:  # sums of products in another order may exchange blocks that are close
        raise AssertionError(f"selection agrees in {same} of the blocks")
    keys = shape.past + shape.tokens / 2
    if not SELECTORS[selector].scores_tokens:
        keys *= (1 if selector == "forecast" else 2) / geometry.pool_stride
    flop = 2.0 * shape.tokens * heads * keys * shape.dim
    num_bytes = 2 * query.numel() + sum(tensor.nbytes for tensor in summary) + 4 * ids.numel()
    return {**_row([call] * 2, flop, num_bytes, rates), "same_blocks": round(same, 4)}


def _summary(device: torch.device, shape: Shape, groups: int, selector: str) -> list[torch.Tensor]:
    """Return random pooled keys, or those of every token in few bits."""
    geometry, rule = shape.geometry, SELECTORS[selector]
    if not rule.scores_tokens:
        return [randn(device, 1, groups, geometry.num_windows, shape.dim)]
    k = randn(device, 1, groups, shape.past + shape.tokens, shape.dim)
    tensors = empty_summary(rule.summary, k, geometry)
    nothing, mask = torch.zeros(1, dtype=torch.int32), torch.ones(1, k.shape[2], dtype=torch.bool)
    rule.summary.extend(tensors, k, nothing, mask.to(device), geometry)
    return tensors


def _published(device: torch.device, shape: Shape, rates: tuple[float, float]) -> dict[str, Any]:
    """Return the row of a whole prompt; its two sequences are the heads of one twice as wide."""
    whole = dataclasses.replace(
        shape,
        tokens=shape.past + shape.tokens,
        past=0,
        heads=2 * shape.heads,
        scored=min(_PUBLISHED_SCORED, shape.scored),
    )
    whole = dataclasses.replace(whole, tokens=min(whole.tokens, 1 << 17))
    row = _op(Case(device, whole, 2 * _GROUPS[0]), rates)
    return {
        **row,
        "tokens": whole.tokens,
        "selected": whole.selected,
        "published_us": _PUBLISHED_US,
        "published_over": round(_PUBLISHED_US / row["median"], 3),
    }


def _bytes(case: Case) -> float:
    """Return the bytes that attention reads and writes at least once."""
    numbers = 2 * case.query.numel() + 2 * case.kv[0].numel() + case.pages.numel()
    return 2.0 * numbers + 4.0 * case.ids.numel()


def _op(case: Case, rates: tuple[float, float]) -> dict[str, Any]:
    """Return the row of the op as it is called, behind a comparison with fp64."""
    case.stage()
    error = case.error(case.attend())
    if not error < MOST_ERROR:
        raise AssertionError(f"attention of a prompt is off by {error}")
    return {**_row([case.attend] * 2, case.flop, _bytes(case), rates), "error": error}


def _attend(case: Case, rates: tuple[float, float]) -> dict[str, Any]:
    """Return rows of the op, and for tiles of 64 and 128 rows of the union and of attention."""
    shape, groups, query, ids = case.shape, case.groups, case.query, case.ids
    rows = {f"attend_g{groups}": _op(case, rates)}
    copied = 2.0 * 2 * case.pages.numel()
    rows[f"stage_g{groups}"] = _row([case.stage] * 2, 0.0, copied + 4 * ids.numel(), rates)
    paged = (case.pages, case.table)
    prompt = token_blocks.pack_prompt(case.kv, case.numbered, case.lengths, case.staged, paged)
    out = torch.empty_like(query)
    for lines in (64, 128):
        tokens = lines * groups // shape.heads
        at = (ids, tokens, 0, -(-shape.tokens // tokens))
        find = partial(token_blocks.unions, prompt, *at)
        union = find()
        attend = partial(
            attend_tokens.attend_unions, query, prompt, union, out, 0, case.factors, lines
        )
        assert union.counts is not None
        found = float(union.counts.float().mean())
        name = f"g{groups}_rows_{lines}"
        row = _row([attend] * 2, case.flop, _bytes(case), rates)
        rows[f"attend_{name}"] = {**row, "union": found}
        moved = 4.0 * ids.numel() + 12.0 * float(union.counts.sum())
        rows[f"unions_{name}"] = _row([find] * 2, 0.0, moved, rates)
    return rows
