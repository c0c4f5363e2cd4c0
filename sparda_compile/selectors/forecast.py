"""The Forecast's scores: one raw dot product per group and pooled key.

    score[g, j] = f_g . pooled_k[g, j]           block m = max over the windows that touch it

No scale and no softmax: with one head per group the order does not depend on them.
Source: SparDA (arXiv 2606.04511), Forecast scoring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sparda_compile.selectors.base import Selector, Summary
from sparda_compile.selectors.pooled_keys import (
    PooledKeys,
    existing_windows,
    windows_to_blocks,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparda_compile.selectors.base import Geometry

__all__ = ["Forecast"]


class Forecast(Selector):
    """Scores of a predicted query, one head per group."""

    name: ClassVar[str] = "forecast"
    kernels: ClassVar[tuple[str, ...]] = ("_score_forecast",)
    summary: ClassVar[Summary] = PooledKeys()
    settles: ClassVar[bool] = True

    def score(
        self,
        query_BHTD: Tensor,
        tensors: Sequence[Tensor],
        lengths_B: Tensor,
        scale: float,
        geometry: Geometry,
    ) -> Tensor:
        """Return [B, G, N] float32; `query_BHTD` has H = G heads."""
        del scale
        pooled_BGWD = tensors[0]
        dots = pooled_BGWD.float() @ query_BHTD[:, :, 0, :, None].float()
        exists_BW = existing_windows(lengths_B, pooled_BGWD.shape[2], geometry)[:, None]
        scores_BGW = dots[..., 0].masked_fill(~exists_BW, float("-inf"))
        return windows_to_blocks(scores_BGW, geometry)
