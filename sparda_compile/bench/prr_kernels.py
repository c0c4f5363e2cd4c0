"""Parts of one layer alone, beside what PRR (arXiv 2606.30389) states for its own.

    attention    over selected blocks: ours, SDPA over gathered ones, FlashInfer's block-sparse one,
                 by the faster of two backends; by tokens and by tokens of a block, 32 query heads
                 on 8 KV heads, 128K tokens
    selection    scores and the choice of blocks, ours and torch's operators, by context
    prediction   the update of level and trend, the prediction, and, once a prompt, the search of
                 the weights that predict its last tokens best, by context

Each is timed in CUDA graphs, on data that the L2 cache cannot hold; outputs are compared first.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.bench.prr_case import (
    MOST_ERROR,
    DecodeShape,
    PrrCase,
    attend_exactly,
    error_of,
)
from sparda_compile.bench.prr_others import (
    BACKENDS,
    BlockSparse,
    best_sdpa,
    gather,
    torch_selection,
)
from sparda_compile.bench.prr_programs import predict, score, select, update
from sparda_compile.bench.refusals import REFUSALS, reason_of
from sparda_compile.bench.timing import Spread, graph_us, graphs_us
from sparda_compile.kernels.calibrate import CALIBRATION_WINDOW, calibrate
from sparda_compile.kernels.sparse_attention import sparse_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["AttentionShape", "bench_attention", "bench_prediction", "bench_selection"]

_L2_BYTES: Final = 160 << 20
_MOST_SETS: Final = 40
_ROUNDS: Final = 10
# PRR's table 3: its kernel over FlashInfer's, by tokens of a block; and microseconds of a layer's
# selection by context, of its own profile (`roofline/utilization.csv`); and of a prediction.
_PAPER_BUDGETS: Final = (1024, 2048, 4096, 6144, 8192)
_PAPER_OVER: Final = {
    16: (1.17, 1.28, 2.00, 2.83, 3.68),
    32: (1.17, 1.38, 2.09, 2.78, 3.69),
    64: (1.17, 1.38, 2.26, 2.91, 3.64),
    128: (1.17, 1.41, 2.23, 3.00, 3.71),
}
_PAPER_SELECTION: Final = {
    16384: 48.38,
    32768: 50.24,
    65536: 55.90,
    131072: 62.53,
    262144: 69.63,
    524288: 105.89,
}
# Of a calibration: what is exposed of it, and the whole search; whether of all layers is not said.
_PAPER_CALIBRATION: Final = {
    16384: {"exposed": 60, "all": 2400},
    65536: {"exposed": 280, "all": 11200},
}
_PAPER_PREDICTION: Final = 10.0


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Sizes of attention alone.

    Attributes:
        tokens: Of the cache.
        heads: Query heads.
        groups: KV heads.
        dim: D.
        budgets: Tokens that are read.
        blocks: Tokens of a block.
    """

    tokens: int = 131072
    heads: int = 32
    groups: int = 8
    dim: int = 128
    budgets: tuple[int, ...] = _PAPER_BUDGETS
    blocks: tuple[int, ...] = tuple(_PAPER_OVER)


def bench_attention(
    device: torch.device,
    gbps: float,
    say: Callable[[str], None],
    shape: AttentionShape | None = None,
) -> dict[str, Any]:
    """Measure attention to blocks that are given.

    Args:
        device: Where.
        gbps: The memory's bandwidth, 10^9 bytes per second.
        say: Told what is being measured.
        shape: Sizes; a test has smaller ones.

    Returns:
        `cells`, one for each size of a block and tokens that are read, and over all of them how
        many times as long the others take.
    """
    shape = shape or AttentionShape()
    cells = []
    for size in shape.blocks:
        for budget in shape.budgets:
            say(f"attention to {budget} tokens in blocks of {size}")
            cells.append(_Attention(device, shape, size, budget).measure(gbps))
    ratios: dict[str, Any] = {}
    for name in ("over_flashinfer", "over_sdpa", "over_gather_sdpa"):
        found = [cell[name] for cell in cells if name in cell]
        if found:
            mean = round(sum(found) / len(found), 3)
            ratios[name] = {"mean": mean, "best": max(found), "least": min(found)}
    paper = {"mean": 2.22, "best": 3.71}
    return {"tokens": shape.tokens, "cells": cells, "ratios": ratios, "paper": paper}


class _Attention:
    """One cell: sets of blocks of one cache, none of them in two sets."""

    def __init__(self, device: torch.device, shape: AttentionShape, size: int, budget: int) -> None:
        self.shape, self.size, self.budget, self.device = shape, size, budget, device
        self.scale = shape.dim**-0.5
        blocks, selected = shape.tokens // size, budget // size
        self.num_bytes = shape.groups * selected * 2 * size * shape.dim * 2
        self.sets = min(_MOST_SETS, math.ceil(_L2_BYTES / self.num_bytes), blocks // selected)
        random = torch.Generator(device=device).manual_seed(size)
        pages = (1, shape.groups, blocks, 2, size, shape.dim)
        self.pages = torch.empty(pages, dtype=torch.bfloat16, device=device)
        self.pages.normal_(generator=random)
        order = torch.rand(1, shape.groups, blocks, generator=random, device=device).argsort(-1)
        chosen = order[..., : self.sets * selected].split(selected, dim=-1)
        self.ids = [ids.sort(-1).values.int().contiguous() for ids in chosen]
        self.begin = torch.arange(shape.groups, device=device).view(1, -1, 1) * 2 * blocks
        query = (1, shape.heads, 1, shape.dim)
        self.query = torch.empty(query, dtype=torch.bfloat16, device=device)
        self.query.normal_(generator=random)
        self.lengths = torch.full((1,), shape.tokens - 1, dtype=torch.int32, device=device)
        self.exact = attend_exactly(self.query, self.pages, self.ids[0], self.scale)
        self.skipped: dict[str, str] = {}

    def measure(self, gbps: float) -> dict[str, Any]:
        """Return the row of the cell."""
        ours = [partial(self._ours, ids) for ids in self.ids]
        if not (error := error_of(ours[0](), self.exact)) < MOST_ERROR:
            raise AssertionError(f"attention is off by {error}")
        gathered = [gather(self.pages, self.begin, ids.long()) for ids in self.ids]
        best, forms = best_sdpa([(self.query, *each) for each in gathered])
        calls: dict[str, Sequence[Callable[[], Tensor]]] = {"ours": ours}
        if best is None:
            self.skipped["sdpa"] = str(forms)
        else:
            calls["sdpa"] = [partial(best[1], self.query, *each) for each in gathered]
            calls["gather_sdpa"] = [partial(self._gathered, best[1], ids) for ids in self.ids]
        row: dict[str, Any] = {"block": self.size, "budget": self.budget, "sets": self.sets}
        for backend in BACKENDS:
            calls |= self._flashinfer(backend, row)
        programs = {name: partial(_every, each) for name, each in calls.items()}
        for name, times in graphs_us(programs, _ROUNDS).items():
            row[name] = Spread.of([us / self.sets for us in times]).to_dict()
        row["floor_us"] = round(self.num_bytes / gbps / 1e3, 3)
        medians = {name: row[name]["median"] for name in programs}
        theirs = [name for name in medians if name.startswith("flashinfer")]
        if theirs:
            # What it can do at best counts.
            row["flashinfer"] = row[min(theirs, key=medians.__getitem__)]
            medians["flashinfer"] = row["flashinfer"]["median"]
        ours_us = medians.pop("ours")
        row |= {f"over_{name}": round(us / ours_us, 3) for name, us in medians.items()}
        if self.budget in _PAPER_BUDGETS and self.size in _PAPER_OVER:
            row["paper"] = _PAPER_OVER[self.size][_PAPER_BUDGETS.index(self.budget)]
        form = None if best is None else best[0]
        return {**row, "error": error, "sdpa_form": form, "skipped": self.skipped}

    def _ours(self, ids: Tensor) -> Tensor:
        operands = (self.pages, ids, ids, self.lengths, self.scale, 0.0)
        out: Tensor = sparse_attention(self.query, *operands)
        return out

    def _gathered(self, attention: Callable[..., Tensor], ids: Tensor) -> Tensor:
        return attention(self.query, *gather(self.pages, self.begin, ids))

    def _flashinfer(
        self, backend: str, row: dict[str, Any]
    ) -> dict[str, list[Callable[[], Tensor]]]:
        """Return the calls of one of its backends, or none, and note the reason."""
        name = f"flashinfer_{backend}"
        try:
            sparse = BlockSparse(backend, self.device)
            operands = (self.query, self.pages, self.begin)
            calls = [sparse.planned(*operands, ids) for ids in self.ids]
            output = calls[0]()
        except REFUSALS as refusal:
            self.skipped[name] = reason_of(refusal)
            return {}
        error = error_of(output, self.exact)
        if not error < MOST_ERROR:
            self.skipped[name] = f"its output is off by {error:.3g}"
            return {}
        row[f"{name}_plan_us"] = sparse.mean_plan_us()
        return {name: calls}


def _every(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def bench_selection(
    device: torch.device, shapes: Sequence[DecodeShape], gbps: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure selections alone, by context.

    Args:
        device: Where.
        shapes: One for each context.
        gbps: The memory's bandwidth, 10^9 bytes per second.
        say: Told what is being measured.
    """
    rows = {}
    for shape in shapes:
        say(f"selection from {shape.tokens} tokens")
        case = PrrCase(device, dataclasses.replace(shape, attends=False, steps=1))
        steps = [(layer, 0) for layer in case.layers]
        scored = [partial(score, case, *each) for each in steps]
        scores = scored[0]()
        theirs = torch_selection(case)
        ids, _ = select(case, *steps[0][:1], scores)
        for found in (ids, theirs(*steps[0]).sort(-1).values.int()):
            if not torch.equal(found, steps[0][0].ids[steps[0][1]]):
                raise AssertionError("a selection does not follow its trace")
        both = [partial(_selected, case, *each) for each in steps]
        row: dict[str, Any] = {
            "score": graph_us(scored, _ROUNDS).to_dict(),
            "select": graph_us(
                [partial(select, case, layer, scores) for layer, _ in steps], _ROUNDS
            ).to_dict(),
            "both": graph_us(both, _ROUNDS).to_dict(),
            "torch": graph_us([partial(theirs, *each) for each in steps], _ROUNDS).to_dict(),
            "floor_us": round(shape.pooled_bytes / gbps / 1e3, 3),
        }
        if shape.tokens in _PAPER_SELECTION:
            row["paper_us"] = _PAPER_SELECTION[shape.tokens]
        rows[str(shape.tokens)] = row
    return {"by_tokens": rows}


def _selected(case: PrrCase, layer: Any, step: int) -> tuple[Tensor, Tensor]:
    return select(case, layer, score(case, layer, step))


def bench_prediction(
    device: torch.device, shapes: Sequence[DecodeShape], say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure what a prediction takes beside the selection, by context."""
    rows = {}
    for shape in shapes:
        say(f"prediction among {shape.tokens} tokens")
        case = PrrCase(device, dataclasses.replace(shape, attends=False, steps=1))
        scores = [score(case, layer, 0) for layer in case.layers]
        width = round(1.5 * shape.selected)
        budget = torch.full((1,), width, dtype=torch.int32, device=device)
        ahead = case.lengths.new_empty(shape.batch, shape.groups, width)
        pairs = list(zip(case.layers, scores, strict=True))
        updates = [partial(update, case, layer, each) for layer, each in pairs]
        predictions = [partial(predict, case, layer, budget, ahead) for layer, _ in pairs]
        row: dict[str, Any] = {
            "update": graph_us(updates, _ROUNDS).to_dict(),
            "predict": graph_us(predictions, _ROUNDS).to_dict(),
            "calibrate": graph_us([_calibration(case, scores)], _ROUNDS).to_dict(),
        }
        if shape.tokens in _PAPER_CALIBRATION:
            row["paper_calibration_us"] = _PAPER_CALIBRATION[shape.tokens]
        rows[str(shape.tokens)] = row
    return {"by_tokens": rows, "paper_us": _PAPER_PREDICTION}


def _calibration(case: PrrCase, scores: Sequence[Tensor]) -> Callable[[], object]:
    """Return the search of a layer's weights; as the last rows of a prompt stand the scores."""
    shape = case.shape
    rows = torch.stack([scores[row % len(scores)] for row in range(CALIBRATION_WINDOW)])
    before = case.lengths[:, None].expand(-1, CALIBRATION_WINDOW).contiguous()
    choice = (shape.selected, shape.block, shape.sink, shape.local)
    found = torch.zeros(shape.batch, 3, device=case.device)
    num_rows = torch.full((shape.batch,), CALIBRATION_WINDOW, device=case.device)
    return partial(calibrate, rows, before, num_rows, choice, found, are_comparable=True)
