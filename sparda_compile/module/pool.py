"""The memory of caches that nobody uses any more, kept for the next one."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from sparda_compile.progress import showing, stage
from sparda_compile.runtime.kv_cache import KVCache

if TYPE_CHECKING:
    import torch

    from sparda_compile.module.cache import SpardaCache
    from sparda_compile.state.layout import CacheLayout

__all__ = ["CachePool"]


class CachePool:
    """Gives out KV caches, and keeps the first one that came back."""

    def __init__(self) -> None:
        self._idle: list[KVCache] = []

    def take(self, layout: CacheLayout, device: torch.device, *, progress: bool) -> KVCache:
        """Return an empty cache.

        Args:
            layout: Its sizes.
            device: Where its pages live.
            progress: Whether to show on a terminal that memory is being reserved.
        """
        if any(each.layout == layout for each in self._idle):
            kv = self._idle.pop()
            kv.reset()
            return kv
        self._idle.clear()
        with showing(progress), stage("allocate"):
            return KVCache(layout, device)

    def lets_go_of(self, kv: KVCache | None, layout: CacheLayout) -> bool:
        """Whether `take` would let go of a cache that came back: the next one has other sizes.

        Args:
            kv: The cache, if there is one.
            layout: Of the next one.
        """
        is_idle = any(each is kv for each in self._idle)
        return is_idle and all(each.layout != layout for each in self._idle)

    def lend(self, kv: KVCache, to: SpardaCache) -> None:
        """Let a cache hold memory that comes back when it is gone; that may have grown by then."""
        weakref.finalize(to, _give_back, weakref.ref(self), to.hold(kv))


def _give_back(pool: weakref.ref[CachePool], held: list[KVCache]) -> None:
    owner = pool()
    if owner is not None and not owner._idle:
        owner._idle.append(held[0])
