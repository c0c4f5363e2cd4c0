"""Replayed steps of several ranks: a rank that does not come ends them, within the group's timeout.

NCCL's own watchdog sees the collectives that Python issues. Those inside of a CUDA graph are issued
once, while it is captured, and nobody watches its replays: where another rank is gone, the GPU
would wait for ever. So a thread looks at the event behind each replay.

    not done within the timeout      the group is aborted, its kernels end, `check` raises
    not done 10 s later either       the process ends, as torch's watchdog ends one
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.errors import RankLostError
from sparda_compile.ranks.collectives import group_named

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["ReplayWatch", "check_replays", "watch_of"]

_LOOK_S: Final = 0.2
_GRACE_S: Final = 10.0


class ReplayWatch:
    """Watches replays of one process group.

    Args:
        timeout_s: How long a replay may take behind the one before.
        abort: Ends the kernels that wait for other ranks. May itself never return.
        end: Ends the process, given the reason; called if `abort` did not help.
        grace_s: How long `abort` is given.
    """

    def __init__(
        self,
        timeout_s: float,
        abort: Callable[[], object],
        end: Callable[[str], object],
        grace_s: float = _GRACE_S,
    ) -> None:
        self._timeout_s = timeout_s
        self._abort = abort
        self._end = end
        self._grace_s = grace_s
        self._running: deque[Callable[[], bool]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._lost = ""

    def ran(self, is_done: Callable[[], bool]) -> None:
        """Watch a replay that was launched.

        Args:
            is_done: Says whether the GPU is done with it; called by another thread.
        """
        with self._changed:
            self._running.append(is_done)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._watch, name="sparda-replays", daemon=True
                )
                self._thread.start()
            self._changed.notify()

    def check(self) -> None:
        """Refuse to go on behind a replay that did not end.

        Raises:
            RankLostError: If there was one.
        """
        if self._lost:
            raise RankLostError(self._lost)

    def _watch(self) -> None:
        while True:
            with self._changed:
                while not self._running:
                    self._changed.wait()
                is_done = self._running[0]
            if not self._ends(is_done, self._timeout_s):
                self._give_up(is_done)
                return
            self._running.popleft()

    def _ends(self, is_done: Callable[[], bool], seconds: float) -> bool:
        """Return whether a replay ends within a time from now."""
        until = time.monotonic() + seconds
        while not is_done():
            left = until - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(_LOOK_S, left))
        return True

    def _give_up(self, is_done: Callable[[], bool]) -> None:
        self._lost = (
            f"a replayed step did not end within {self._timeout_s:g} s, the timeout of the "
            "process group: another rank has ended, or did not run it. What the step returned is "
            "no result. See what the other ranks say, and start all of them again."
        )
        threading.Thread(target=self._abort, name="sparda-abort", daemon=True).start()
        if not self._ends(is_done, self._grace_s):
            self._end(self._lost)


# By name of the group, with the group itself: another one may have the name later.
_watches: dict[str, tuple[Any, ReplayWatch]] = {}


def watch_of(group: str, device: torch.device) -> ReplayWatch:
    """Return the watch of a process group; made when first asked for.

    Args:
        group: Its name.
        device: The GPU of this rank.

    Raises:
        RankLostError: If the group is gone.
    """
    found = group_named(group)
    if group not in _watches or _watches[group][0] is not found:
        timeout = found._get_backend(device).options._timeout
        _watches[group] = found, ReplayWatch(timeout.total_seconds(), found.abort, _end)
    return _watches[group][1]


def check_replays(group: str) -> None:
    """Refuse to go on in a group, a replay of which did not end.

    Raises:
        RankLostError: If there was one, or the group is gone.
    """
    found = group_named(group)
    watched, watch = _watches.get(group, (None, None))
    if watched is found and watch is not None:
        watch.check()


def _end(reason: str) -> None:
    sys.stderr.write(f"RankLostError: {reason} Aborting the group did not help: exit.\n")
    sys.stderr.flush()
    os._exit(1)
