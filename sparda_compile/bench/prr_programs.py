"""One layer's selection and attention in a decode step, serial and with speculation.

    query       score_blocks, select_pages, sparse_attention
    speculate   attend_predicted, on a stream of its own, beside the selection; repair_predicted
    update      update_prediction and predict_ahead behind it, on another stream: in a model the
                layer's next step comes a whole token later, and nothing before waits for them

The prediction that a step makes is not the one that its next step attends to: that has a coverage
which is stated.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.isa.engines import CudaEngine, ImmediateEngine, current_engine, use_engine
from sparda_compile.isa.streams import ATTEND, COMPUTE, SELECT
from sparda_compile.kernels.predict_blocks import update_prediction
from sparda_compile.kernels.score_blocks import score_blocks
from sparda_compile.kernels.sparse_attention import sparse_attention
from sparda_compile.kernels.speculation import attend_predicted, predict_ahead, repair_predicted
from sparda_compile.runtime.block_table import select_pages

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sparda_compile.bench.prr_case import PrrCase, PrrLayer
    from sparda_compile.isa.engines import Engine

    # Of a layer's place and a step: attention's output.
    Step = Callable[[int, int], Tensor]

__all__ = [
    "Speculation",
    "attend",
    "engine_for",
    "every_step",
    "predict",
    "query_step",
    "score",
    "select",
    "speculating_step",
    "update",
]

_ATTENDED, _UPDATED = 0, 1
# As `SpardaConfig` has them.
_LEVEL, _TREND, _DAMPING = 0.4, 0.3, 0.0
_SELECTOR: Final = "infllm2"


@dataclasses.dataclass(frozen=True)
class Speculation:
    """What a layer attends to early, and what it makes of it.

    Attributes:
        predicted: [B, G, W] int32 of each step, for each layer.
        union: Whether blocks that were predicted in vain count.
        updates: Whether the next step is predicted.
    """

    predicted: list[list[Tensor]]
    union: bool = False
    updates: bool = False


def engine_for(device: torch.device) -> Engine:
    """Return what runs the streams of a device."""
    return CudaEngine(device) if device.type == "cuda" else ImmediateEngine()


def every_step(case: PrrCase, step: Step, engine: Engine) -> Callable[[], list[Tensor]]:
    """Return a program: every step of every layer, each layer's steps as far apart as can be.

    Args:
        case: The layers.
        step: One of them.
        engine: Runs the streams; those that the program used are joined at its end.

    Returns:
        What returns the outputs of the first layer.
    """

    def run() -> list[Tensor]:
        outputs = []
        with use_engine(engine):
            for number in range(case.shape.steps):
                found = [step(place, number) for place in range(len(case.layers))]
                outputs.append(found[0])
            _join(engine)
        return outputs

    return run


def _join(engine: Engine) -> None:
    """Let the compute stream wait for what predicts."""
    for stream in (ATTEND, SELECT):
        engine.submit(stream, lambda: None)
        engine.record(_UPDATED, stream)
        engine.wait(_UPDATED, COMPUTE)


def score(case: PrrCase, layer: PrrLayer, step: int) -> Tensor:
    """Return the scores of a step, [B, G, N] float32."""
    shape = case.shape.geometry
    result: Tensor = score_blocks(
        layer.queries[step],
        [layer.pooled],
        case.lengths,
        _SELECTOR,
        case.scale,
        shape.num_blocks,
        shape.block_size,
        shape.pool_size,
        shape.pool_stride,
    )
    return result


def select(case: PrrCase, layer: PrrLayer, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the selected blocks and their pages, [B, G, K] int32 each."""
    shape = case.shape
    ids, page_ids, *_ = select_pages(
        scores,
        case.lengths,
        *layer.tables,
        case.counters,
        shape.selected,
        shape.block,
        shape.sink,
        shape.local,
        "lru",
        False,
    )
    return ids, page_ids


def attend(case: PrrCase, layer: PrrLayer, step: int, ids: Tensor, page_ids: Tensor) -> Tensor:
    """Return attention to selected blocks, [B, H, 1, D]."""
    result: Tensor = sparse_attention(
        layer.queries[step], layer.pages, page_ids, ids, case.lengths, case.scale, 0.0
    )
    return result


def update(case: PrrCase, layer: PrrLayer, scores: Tensor, stream: int = COMPUTE) -> None:
    """Take a step's scores into level and trend."""
    del case
    update_prediction(scores, layer.level, layer.trend, _LEVEL, _TREND, True, stream)


def predict(
    case: PrrCase, layer: PrrLayer, budget: Tensor, ahead: Tensor, stream: int = COMPUTE
) -> None:
    """Predict the next step.

    Args:
        case: The layers.
        layer: One of them.
        budget: [1] int32, most blocks.
        ahead: [B, G, W] int32, written.
        stream: Where it runs.
    """
    shape = case.shape
    sizes = (1, shape.block, shape.sink, shape.local)
    state = (layer.level, layer.trend, case.lengths, budget, ahead)
    predict_ahead(*state, *sizes, _DAMPING, stream)


def query_step(case: PrrCase) -> Step:
    """Return a step without speculation."""

    def step(place: int, number: int) -> Tensor:
        layer = case.layers[place]
        chosen = select(case, layer, score(case, layer, number))
        return attend(case, layer, number, *chosen)

    return step


def speculating_step(case: PrrCase, setting: Speculation) -> Step:
    """Return a step that begins to attend before its blocks are known."""
    first = setting.predicted[0][0]
    budget = torch.full((1,), first.shape[-1], dtype=torch.int32, device=case.device)
    ahead = torch.full_like(first, -1)
    # What a side stream reads must not be given away before the program ends.
    kept: dict[tuple[int, int], Tensor] = {}

    def step(place: int, number: int) -> Tensor:
        engine, layer = current_engine(), case.layers[place]
        query, predicted = layer.queries[number], setting.predicted[place][number]
        operands = (query, layer.pages, layer.tables[0], predicted, case.lengths, case.scale, 0.0)
        partials = attend_predicted(*operands, ATTEND)
        engine.record(_ATTENDED, ATTEND)
        scores = score(case, layer, number)
        ids, page_ids = select(case, layer, scores)
        engine.wait(_ATTENDED, COMPUTE)
        chosen = (page_ids, ids, predicted, case.lengths)
        rest = (*partials, case.counters, case.scale, 0.0, setting.union)
        result: Tensor = repair_predicted(query, layer.pages, *chosen, *rest)
        if setting.updates:
            kept[place, number] = scores
            update(case, layer, scores, SELECT)
            predict(case, layer, budget, ahead, SELECT)
        return result

    return step
