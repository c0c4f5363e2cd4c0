"""Who leaves when a block needs a page. A policy orders pages; it moves nothing.

Pages of blocks that are selected now never leave. Free pages are taken before any block has to.
Then the page with the lowest stamp goes first, ties by page number; stamps more than 254 steps old
count as equally old, so that a GPU finds the victims in two looks at 4 bits each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TOUCHES_HITS", "victim_order"]

# lru: a hit renews the page's stamp. fifo: only loading a block sets it.
_OLDEST: Final = 254
TOUCHES_HITS: Final = {"lru": True, "fifo": False}


def victim_order(page_stamp_BGC: Tensor, selected_BGC: Tensor, now_B: Tensor) -> Tensor:
    """Return page numbers in the order in which they leave, [B, G, C] int64.

    Args:
        page_stamp_BGC: int32 stamps, -1 for free pages.
        selected_BGC: bool, pages whose block is selected now; they come last.
        now_B: int32, the present stamp.
    """
    age = (now_B[:, None, None] - page_stamp_BGC).clamp(0, _OLDEST)
    key = (_OLDEST - age).masked_fill(page_stamp_BGC < 0, -1)
    return key.masked_fill(selected_BGC, _OLDEST + 1).sort(dim=-1, stable=True).indices
