"""NOSA's selector: a short list by the query, the rest of the budget by what tokens are worth.

    asked[g, m]     score of block m by the query (InfLLM-V2's) or by the Forecast
    c[t, g]         retention score of token t, the same for every query
    kept[g, m]      max over the windows that touch block m of the mean of c over the window
    score[g, m]     above all others for the `short_list` best by `asked`, else kept[g, m]

Sink, local and current blocks are always read, so they are not on the short list. The model's keys
carry c: the last channel of a key is c / scale and that of a query is 1, so q . k * scale is the
model's own logit with c added, and the last channel of a pooled key is the mean of c over its
window, divided by the scale, which changes no order. The query's part leaves that channel out.

Source: NOSA as SparDA (arXiv 2606.04511) takes it: 18 forced blocks, 23 by the query or the
Forecast, 55 by retention, 96 in all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import torch

from sparda_compile.selectors.base import Selector, Summary
from sparda_compile.selectors.forecast import Forecast
from sparda_compile.selectors.infllm2 import InfLLM2
from sparda_compile.selectors.pooled_keys import (
    PooledKeys,
    existing_windows,
    windows_to_blocks,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparda_compile.selectors.base import Geometry

__all__ = ["LISTED", "Nosa", "NosaForecast"]

# Above any retention score, and below what a benchmark's trace asks for.
LISTED: Final = 1e29


class Nosa(Selector):
    """The short list is the query's."""

    name: ClassVar[str] = "nosa"
    kernels: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[Summary] = PooledKeys()
    forecast_selector: ClassVar[str] = "nosa_forecast"
    has_short_list: ClassVar[bool] = True
    reads_retention: ClassVar[bool] = True
    by_query: ClassVar[Selector] = InfLLM2()

    def score(
        self,
        query_BHTD: Tensor,
        tensors: Sequence[Tensor],
        lengths_B: Tensor,
        scale: float,
        geometry: Geometry,
    ) -> Tensor:
        """Return [B, G, N] float32; short-listed blocks share one score above all others."""
        pooled_BGWD = tensors[0]
        asked_BGN = self.by_query.score(
            query_BHTD[..., :-1], [pooled_BGWD[..., :-1]], lengths_B, scale, geometry
        )
        exists_BW = existing_windows(lengths_B, pooled_BGWD.shape[2], geometry)[:, None]
        retention_BGW = pooled_BGWD[..., -1].float().masked_fill(~exists_BW, float("-inf"))
        kept_BGN = windows_to_blocks(retention_BGW, geometry)
        return kept_BGN.masked_fill(_short_list(asked_BGN, lengths_B, geometry), LISTED)


class NosaForecast(Nosa):
    """The short list is the Forecast's; the rest is as with the query."""

    name: ClassVar[str] = "nosa_forecast"
    by_query: ClassVar[Selector] = Forecast()


def _short_list(asked_BGN: Tensor, lengths_B: Tensor, geometry: Geometry) -> Tensor:
    """Return [B, G, N] bool: the best blocks that are not forced; ties go to the lower id."""
    block_N = torch.arange(geometry.num_blocks, device=asked_BGN.device)
    first_local_B1 = (lengths_B.long() // geometry.block_size - geometry.local_blocks)[:, None]
    forced_BN = (block_N < geometry.sink_blocks) | (block_N >= first_local_B1)
    ranked_BGN = asked_BGN.masked_fill(forced_BN[:, None], float("-inf"))
    best = ranked_BGN.sort(dim=-1, descending=True, stable=True).indices[..., : geometry.short_list]
    listed_BGN = torch.zeros_like(asked_BGN, dtype=torch.bool).scatter(-1, best, True)
    return listed_BGN & (ranked_BGN > float("-inf"))
