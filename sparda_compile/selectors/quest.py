"""Quest's selector: an upper bound of q . k over each block, from its smallest and largest key.

    score[g, m] = sum_d max(qbar_d * min_d, qbar_d * max_d)        qbar = mean of the group's heads

Source: Quest, in the form for grouped queries of PRR (arXiv 2606.30389) appendix A.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sparda_compile.selectors.base import Geometry, Selector, Summary, valid_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["KeyBounds", "Quest"]


class KeyBounds(Summary):
    """One tensor, `key_bounds` [B, G, N, 2, D]: the smallest and the largest key per channel."""

    name: ClassVar[str] = "key_bounds"
    kernels: ClassVar[tuple[str, ...]] = ("_append_key_bounds",)

    def shapes(self, geometry: Geometry, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shape behind [B, G]."""
        return {"key_bounds": (geometry.num_blocks, 2, head_dim)}

    def reset(self, tensors: Sequence[Tensor]) -> None:
        """Make every bound empty: smallest +inf, largest -inf."""
        (bounds,) = tensors
        bounds[..., 0, :].fill_(float("inf"))
        bounds[..., 1, :].fill_(float("-inf"))

    def extend(
        self,
        tensors: Sequence[Tensor],
        k_BGTD: Tensor,
        lengths_B: Tensor,
        token_mask_BT: Tensor | None,
        geometry: Geometry,
    ) -> None:
        """Widen the bounds of the blocks that the new keys fall in."""
        (bounds_BGN2D,) = tensors
        if token_mask_BT is None:
            rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
            block_B = lengths_B.long() // geometry.block_size
            old_BG2D = bounds_BGN2D[rows_B, :, block_B]
            key_BGD = k_BGTD[:, :, 0]
            bounds_BGN2D[rows_B, :, block_B] = torch.stack(
                [
                    torch.minimum(old_BG2D[:, :, 0], key_BGD),
                    torch.maximum(old_BG2D[:, :, 1], key_BGD),
                ],
                dim=2,
            )
            return
        for row, length in enumerate(lengths_B.tolist()):
            keys_GTD = valid_tokens(k_BGTD[row], token_mask_BT[row])
            positions_T = torch.arange(length, length + keys_GTD.shape[1], device=keys_GTD.device)
            index = (positions_T // geometry.block_size)[None, :, None].expand_as(keys_GTD)
            low, high = bounds_BGN2D[row, :, :, 0], bounds_BGN2D[row, :, :, 1]
            low.scatter_reduce_(1, index, keys_GTD, "amin")
            high.scatter_reduce_(1, index, keys_GTD, "amax")


class Quest(Selector):
    """Query-driven bounds per block."""

    name: ClassVar[str] = "quest"
    kernels: ClassVar[tuple[str, ...]] = ("_score_quest",)
    summary: ClassVar[Summary] = KeyBounds()
    settles: ClassVar[bool] = True

    def score(
        self,
        query_BHTD: Tensor,
        tensors: Sequence[Tensor],
        lengths_B: Tensor,
        scale: float,
        geometry: Geometry,
    ) -> Tensor:
        """Return [B, G, N] float32."""
        del scale
        (bounds_BGN2D,) = tensors
        groups = bounds_BGN2D.shape[1]
        query_BGD = query_BHTD[:, :, 0].unflatten(1, (groups, -1)).float().mean(2)
        bounds = bounds_BGN2D.float()
        starts_N = torch.arange(geometry.num_blocks, device=lengths_B.device) * geometry.block_size
        empty_BN = (starts_N >= lengths_B[:, None])[:, None]
        finite = bounds.masked_fill(empty_BN[..., None, None], 0.0)
        scores_BGN: Tensor = (query_BGD[:, :, None, None] * finite).amax(3).sum(-1)
        return scores_BGN.masked_fill(empty_BN, float("-inf"))
