"""How long work that is counted will still take, by the time that its first parts took."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Pace"]


class Pace:
    """Counts work that is done.

    Args:
        total: All of the work, in any unit.
        clock: Seconds.
    """

    def __init__(self, total: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._left = total
        self._done = 0.0
        self._clock = clock
        self._begin = clock()

    def add(self, amount: float) -> None:
        """Count work that was done just now."""
        self._done += amount
        self._left -= amount

    def leave_out(self, amount: float) -> None:
        """Count work that need not be done."""
        self._left -= amount

    def __str__(self) -> str:
        """Return `about 3 min left`; before anything was done, nothing."""
        if not self._done:
            return ""
        seconds = (self._clock() - self._begin) * max(self._left, 0.0) / self._done
        if seconds < 90:
            return f"about {seconds:.0f} s left"
        minutes = seconds / 60
        return (
            f"about {minutes:.0f} min left" if minutes < 90 else f"about {minutes / 60:.1f} h left"
        )
