"""The streams that a program's ops run on, and whose work each starts behind.

    compute   the model and all that its tokens need at once
    copy      blocks between CPU and device
    select    which blocks a layer to come will read: scores, ids, pages
    attend    attention that runs beside the model, and what only later steps use
    repair    blocks that a guess has missed: few, and waited for soon, so they do not queue behind
              those that a layer to come will read

To add one, add a line to each table: scheduler, verifier and engines read them.
"""

from __future__ import annotations

from typing import Final

__all__ = ["ATTEND", "BEHIND", "COMPUTE", "COPY", "REPAIR", "SELECT", "STREAM_NAMES"]

COMPUTE: Final = 0
COPY: Final = 1
SELECT: Final = 2
ATTEND: Final = 3
REPAIR: Final = 4
STREAM_NAMES: Final = ("compute", "copy", "select", "attend", "repair")
# Whose work a stream's work starts behind, as far as it was issued before; see `engines.Engine`.
BEHIND: Final = {
    COMPUTE: (),
    SELECT: (COMPUTE,),
    COPY: (COMPUTE, SELECT),
    ATTEND: (COMPUTE,),
    REPAIR: (COMPUTE,),
}
