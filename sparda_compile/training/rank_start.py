"""Where the Forecasts of a sharded model start: at those of all its KV heads.

    W_r  = start of the heads of rank r, by its own queries        [G/N * F*D, hidden]
    W    = W_0, ..., W_n-1 under each other                        [G * F*D, hidden]

Each rank then keeps W, or the closest product of the rank that W gets, as one process would; its
program takes the rows of its own heads (`forecast/parts.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.forecast.projection import Projection, ProjectionShape
from sparda_compile.forecast.start import initial_forecast
from sparda_compile.ranks.collectives import all_gather
from sparda_compile.ranks.shards import splits_heads
from sparda_compile.training.taps import tap_forward

if TYPE_CHECKING:
    from sparda_compile.config import SpardaConfig
    from sparda_compile.program.captures import Captures
    from sparda_compile.training.taps import TappedForward

__all__ = ["traced_config", "whole_start"]


def traced_config(captures: Captures, config: SpardaConfig) -> SpardaConfig:
    """Return the configuration to trace with: of several ranks, with the rank of W for each part.

    Args:
        captures: Of the model.
        config: Of the training.

    Raises:
        UnsupportedInputError: If layers differ in it.
    """
    if captures.ranks.is_alone:
        return config
    parts = tap_forward(captures, config, 1).shapes
    found = {_whole(shape, captures, config).rank for shape in parts.values()}
    if len(found) > 1:
        raise UnsupportedInputError(
            f"layers of {captures.model_name} get Forecasts of different ranks "
            f"({', '.join(map(str, found))}), which is not supported for a model that "
            f"{captures.ranks.size} ranks share; set forecast_rank."
        )
    rank = found.pop()
    return config if rank is None else config.replace(forecast_rank=rank)


def whole_start(
    captures: Captures, forward: TappedForward, config: SpardaConfig
) -> dict[int, Projection]:
    """Return the projections of all KV heads that nobody has trained, float32, by target layer.

    Args:
        captures: Of the model.
        forward: Traced with `traced_config`.
        config: Of the training.
    """
    ranks, shapes = captures.ranks, forward.shapes
    if not ranks.is_alone:
        shapes = {n: ProjectionShape(each.rows, each.hidden) for n, each in shapes.items()}
    start = initial_forecast(
        forward.graph_module.graph,
        forward.sites,
        shapes,
        captures.get("prefill", last_logits_only=True),
        torch.float32,
    )
    if ranks.is_alone:
        return start
    whole = {}
    for layer, part in start.items():
        weight = part.product()
        if splits_heads(captures.original):
            weight = all_gather(weight, ranks.size, ranks.group)
        rank = _whole(part.shape, captures, config).rank
        whole[layer] = Projection.truncated(weight, rank)
    return whole


def _whole(part: ProjectionShape, captures: Captures, config: SpardaConfig) -> ProjectionShape:
    """Return the sizes of the projection of all heads, by those of one rank's."""
    copies = captures.ranks.size if splits_heads(captures.original) else 1
    rows, heads = part.rows * copies, config.heads_of_forecast
    return ProjectionShape.of(rows, part.hidden, config.forecast_rank, heads)
