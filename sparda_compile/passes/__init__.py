"""The pipeline: graph in, graph out. The order is this tuple and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sparda_compile.passes.check.verify_transfers import VerifyTransfers
from sparda_compile.passes.find.find_attention import FindAttention
from sparda_compile.passes.rewrite.fuse_projections import FuseProjections
from sparda_compile.passes.rewrite.fuse_selection import FuseSelection
from sparda_compile.passes.rewrite.insert_forecast import InsertForecast
from sparda_compile.passes.rewrite.insert_prefetch import InsertPrefetch
from sparda_compile.passes.rewrite.insert_speculation import InsertSpeculation
from sparda_compile.passes.rewrite.replace_attention import ReplaceAttention
from sparda_compile.passes.schedule.schedule_transfers import ScheduleTransfers

if TYPE_CHECKING:
    from sparda_compile.passes.base import GraphPass

__all__ = ["OPTIONAL_PASSES", "PIPELINE"]

PIPELINE: Final[tuple[GraphPass, ...]] = (
    FindAttention(),
    ReplaceAttention(),
    InsertForecast(),
    FuseProjections(),
    InsertPrefetch(),
    InsertSpeculation(),
    FuseSelection(),
    ScheduleTransfers(),
    VerifyTransfers(),
)

# Without these the program is slower, not wrong: copies stay in line, or where they were made,
# attention begins when the selection has ended, and selecting and projecting take more launches.
OPTIONAL_PASSES: Final = frozenset(
    {
        "fuse_projections",
        "insert_prefetch",
        "insert_speculation",
        "fuse_selection",
        "schedule_transfers",
    }
)
