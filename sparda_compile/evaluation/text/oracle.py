"""The oracle: a selector that knows all keys, and picks the blocks with most attention mass.

    weight[h, t] = softmax_t(q_h . k[t] * scale)      over all earlier tokens
    score[g, n]  = sum_{h in g} sum_{t in n} weight[h, t]

No selector that reads whole blocks of a group finds more of the attention's mass in as many. It
reads every key in each step, so it costs what it is to save: it says how good a choice can be. Like
all selectors it scores before the step's own key is there, which is in a block that is read anyway.

Dimensions: B batch, G groups, R query heads of a group, N blocks, P tokens of a block, D head dim,
S = N * P.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, ClassVar, Final

import torch

from sparda_compile.registry import SELECTORS
from sparda_compile.selectors.base import Geometry, RowSummary, Selector, Summary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

__all__ = ["ORACLE", "AllKeys", "Oracle", "oracle_selector"]

ORACLE: Final = "oracle"


class AllKeys(RowSummary):
    """One tensor, `all_k` [B, G, N, P, D]: every key."""

    name: ClassVar[str] = "all_keys"
    kernels: ClassVar[tuple[str, ...]] = ()

    def shapes(self, geometry: Geometry, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shape behind [B, G]."""
        return {"all_k": (geometry.num_blocks, geometry.block_size, head_dim)}

    def _append(
        self, tensors: Sequence[Tensor], k_BG1D: Tensor, lengths_B: Tensor, geometry: Geometry
    ) -> None:
        (all_BGNPD,) = tensors
        rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        length_B = lengths_B.long()
        block_B, slot_B = length_B // geometry.block_size, length_B % geometry.block_size
        all_BGNPD[rows_B, :, block_B, slot_B] = k_BG1D[:, :, 0]

    def _extend_row(
        self, tensors: Sequence[Tensor], k_GTD: Tensor, length: int, geometry: Geometry
    ) -> None:
        del geometry
        (all_GNPD,) = tensors
        all_GNPD.flatten(1, 2)[:, length : length + k_GTD.shape[1]] = k_GTD


class Oracle(Selector):
    """Attention mass by the keys themselves."""

    name: ClassVar[str] = ORACLE
    kernels: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[Summary] = AllKeys()
    selects_prompts: ClassVar[bool] = False
    is_comparable: ClassVar[bool] = True

    def score(
        self,
        query_BHTD: Tensor,
        tensors: Sequence[Tensor],
        lengths_B: Tensor,
        scale: float,
        geometry: Geometry,
    ) -> Tensor:
        """Return [B, G, N] float32."""
        (all_BGNPD,) = tensors
        keys_BGSD = all_BGNPD.flatten(2, 3).float()
        query_BGRD = query_BHTD[:, :, 0].unflatten(1, (keys_BGSD.shape[1], -1)).float()
        token_S = torch.arange(keys_BGSD.shape[2], device=lengths_B.device)
        hidden_BS = token_S >= lengths_B[:, None]
        logits_BGRS = query_BGRD @ keys_BGSD.transpose(-1, -2) * scale
        weights_BGRS = logits_BGRS.masked_fill(hidden_BS[:, None, None], float("-inf")).softmax(-1)
        mass_BGN = weights_BGRS.sum(2).unflatten(-1, (-1, geometry.block_size)).sum(-1)
        empty_BN = hidden_BS[:, :: geometry.block_size]
        scores_BGN: Tensor = mass_BGN.masked_fill(empty_BN[:, None], float("-inf"))
        return scores_BGN


@contextlib.contextmanager
def oracle_selector() -> Iterator[None]:
    """Let configurations name the oracle inside the block, and modules made there run.

    Raises:
        ConfigError: If another selector has its name.
    """
    SELECTORS.add(Oracle())
    try:
        yield
    finally:
        SELECTORS.remove(ORACLE)
