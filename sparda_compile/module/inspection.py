"""What an optimized module shows of itself: `fast.sparda`."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from sparda_compile.errors import KVCacheError, UnsupportedInputError

if TYPE_CHECKING:
    from torch import fx

    from sparda_compile.module.optimized import OptimizedModule
    from sparda_compile.report.schedule import Schedule
    from sparda_compile.runtime.kv_cache import KVCache
    from sparda_compile.runtime.stats import CacheStats

__all__ = ["Sparda"]


class Sparda:
    """What an optimized module shows of itself."""

    def __init__(self, module: OptimizedModule) -> None:
        self._module = weakref.ref(module)

    def graph(self, phase: str, after: str | None = None) -> fx.GraphModule:
        """Return the graph of a phase.

        Args:
            phase: `prefill` or `decode`.
            after: A pass, or `capture`, whose result to return; None is the last one. `split` is
                the last one cut into pieces, each a submodule, as it is compiled and run.

        Raises:
            ConfigError: If there is no such stage.
        """
        return self._owner.programs.latest_plan(phase).stage(after)

    def schedule(self, phase: str) -> Schedule:
        """Return the schedule of a phase.

        Raises:
            UnsupportedInputError: If `disable_passes` leaves scheduling out.
        """
        schedule = self._owner.programs.latest_plan(phase).schedule
        if schedule is None:
            raise UnsupportedInputError(
                "there is no schedule: disable_passes leaves schedule_transfers or insert_prefetch "
                "out, or nothing is offloaded."
            )
        return schedule

    def stats(self) -> CacheStats:
        """Return the counts of the cache used last; waits for the device.

        Raises:
            KVCacheError: If nothing has run yet.
        """
        return self._last_cache.stats()

    def reset_stats(self) -> None:
        """Zero the counts of the cache used last."""
        self._last_cache.reset_stats()

    @property
    def num_compilations(self) -> dict[str, int]:
        """Programs compiled so far, by phase."""
        return self._owner.programs.num_compiled()

    @property
    def num_captures(self) -> int:
        """Times that the model's forward was traced."""
        return self._owner.captures.num_captures

    @property
    def _owner(self) -> OptimizedModule:
        module = self._module()
        if module is None:
            raise UnsupportedInputError("the optimized module is gone; keep a reference to it.")
        return module

    @property
    def _last_cache(self) -> KVCache:
        cache = self._owner.last_cache
        if cache is None:
            raise KVCacheError("nothing has run yet; call generate or forward first.")
        return cache
