"""InfLLM-V2's selector: softmax of each query head over the pooled keys, summed over the group.

    score[g, j] = sum_{h in g} softmax_j(q_h . pooled_k[g, j] * scale)
    block m     = max of score over the windows that touch it

Source: SparDA (arXiv 2606.04511), the `sparse` baseline; exact normaliser over all pooled keys.
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

__all__ = ["InfLLM2"]


class InfLLM2(Selector):
    """Query-driven scores over pooled keys."""

    name: ClassVar[str] = "infllm2"
    kernels: ClassVar[tuple[str, ...]] = ("_infllm2_logits", "_infllm2_blocks")
    summary: ClassVar[Summary] = PooledKeys()
    is_comparable: ClassVar[bool] = True  # shares of one attention

    def score(
        self,
        query_BHTD: Tensor,
        tensors: Sequence[Tensor],
        lengths_B: Tensor,
        scale: float,
        geometry: Geometry,
    ) -> Tensor:
        """Return [B, G, N] float32."""
        pooled_BGWD = tensors[0]
        groups, windows = pooled_BGWD.shape[1], pooled_BGWD.shape[2]
        query_BGRD = query_BHTD[:, :, 0].unflatten(1, (groups, -1)).float()
        logits_BGRW = query_BGRD @ pooled_BGWD.float().transpose(-1, -2) * scale
        exists_BW = existing_windows(lengths_B, windows, geometry)[:, None]
        hidden = ~exists_BW[:, None]
        weights_BGRW = logits_BGRW.masked_fill(hidden, float("-inf")).softmax(-1)
        scores_BGW = weights_BGRW.sum(2).masked_fill(~exists_BW, float("-inf"))
        return windows_to_blocks(scores_BGW, geometry)
