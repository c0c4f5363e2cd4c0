"""Neighbouring tokens of a prompt that read one set of blocks: that of the first of them.

    run     the positions m * R .. m * R + R - 1, of one block, since R divides its tokens
    lead    the first token of a run that a call has; it picks for all of them

All tokens of a run have the same current and local blocks, so what its lead picks is causal for
each. A run that two calls share has a lead in either of them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.kernels.asked import Asked

__all__ = ["Leads", "leads_of"]


@dataclasses.dataclass(frozen=True)
class Leads:
    """The tokens that pick for all.

    Attributes:
        columns: [B, M] int64, their columns; any where there are fewer than M.
        positions: [B, M] int32, -1 where there are fewer.
        runs: [B, T] int64, which of them picks for each token.
    """

    columns: Tensor
    positions: Tensor
    runs: Tensor

    def of(self, tensor_BXTD: Tensor) -> Tensor:
        """Return what the leads have, [B, X, M, D]."""
        batch, heads, _, dim = tensor_BXTD.shape
        place = self.columns[:, None, :, None].expand(batch, heads, -1, dim)
        return tensor_BXTD.gather(2, place)

    def ask(self, asked: Asked, shared: int) -> Asked:
        """Return the same question of the leads alone; `shared` as for `leads_of`."""
        return dataclasses.replace(
            asked, query=self.of(asked.query), positions=self.positions, spread=shared
        )

    def spread(self, tensor_BGMK: Tensor, out_BGTK: Tensor) -> None:
        """Give each token what its lead has."""
        torch.gather(
            tensor_BGMK, 2, self.runs[:, None, :, None].expand(out_BGTK.shape), out=out_BGTK
        )


def leads_of(positions_BT: Tensor, lengths_B: Tensor, shared: int) -> Leads:
    """Return the leads of a call's tokens.

    Args:
        positions_BT: int32 position of each token, -1 for padding; a sequence's are consecutive.
        lengths_B: int32, tokens before this call.
        shared: R, tokens of a run.
    """
    batch, num_tokens = positions_BT.shape
    most = -(-num_tokens // shared) + 1
    position, first = positions_BT.long(), lengths_B.long()[:, None]
    run = (position // shared - first // shared).clamp(min=0)
    leads = (position >= 0) & ((position % shared == 0) | (position == first))
    place = run.where(leads, most)  # others go to a place of nobody
    column = torch.arange(num_tokens, device=position.device).expand(batch, -1)
    columns = position.new_zeros((batch, most + 1)).scatter(1, place, column)
    found = positions_BT.new_full((batch, most + 1), -1).scatter(1, place, positions_BT)
    return Leads(columns[:, :most], found[:, :most].contiguous(), run)
