"""The pipeline: graph in, graph out. The order is this tuple and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sparda_compile.passes.find_attention import FindAttention
from sparda_compile.passes.fuse_projections import FuseProjections
from sparda_compile.passes.fuse_selection import FuseSelection
from sparda_compile.passes.insert_forecast import InsertForecast
from sparda_compile.passes.insert_prefetch import InsertPrefetch
from sparda_compile.passes.replace_attention import ReplaceAttention
from sparda_compile.passes.schedule_transfers import ScheduleTransfers
from sparda_compile.passes.verify_transfers import VerifyTransfers

if TYPE_CHECKING:
    from sparda_compile.passes.base import GraphPass

__all__ = ["OPTIONAL_PASSES", "PIPELINE"]

PIPELINE: Final[tuple[GraphPass, ...]] = (
    FindAttention(),
    ReplaceAttention(),
    InsertForecast(),
    FuseProjections(),
    InsertPrefetch(),
    FuseSelection(),
    ScheduleTransfers(),
    VerifyTransfers(),
)

# Without these the program is slower, not wrong: copies stay in line, or where they were made, and
# selecting and projecting take more launches.
OPTIONAL_PASSES: Final = frozenset(
    {"fuse_projections", "insert_prefetch", "fuse_selection", "schedule_transfers"}
)
