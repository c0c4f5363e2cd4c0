"""Who leaves when a block needs a page. A policy orders pages; it moves nothing.

Pages of blocks that are selected now never leave. Among the others the lowest stamp goes first,
ties by page number. Free pages have stamp -1, so they are taken before any block has to leave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TOUCHES_HITS", "victim_order"]

# lru: a hit renews the page's stamp. fifo: only loading a block sets it.
TOUCHES_HITS: Final = {"lru": True, "fifo": False}


def victim_order(page_stamp_BGC: Tensor, selected_BGC: Tensor) -> Tensor:
    """Return page numbers in the order in which they leave, [B, G, C] int64.

    Args:
        page_stamp_BGC: int32 stamps, -1 for free pages.
        selected_BGC: bool, pages whose block is selected now; they come last.
    """
    protected = torch.iinfo(torch.int32).max
    return page_stamp_BGC.masked_fill(selected_BGC, protected).sort(dim=-1, stable=True).indices
