"""A cache of transformers whose memory an optimized module alone makes, fills and gives back.

What transformers' `Cache` does, it does to a list of layers. Here that list is empty, so what is
not overridden would do nothing in silence.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sparda_compile.errors import KVCacheError, UnsupportedInputError
from sparda_compile.module.arguments import CONFIG

__all__ = ["FixedCache", "check_rows"]

_FIXED_BATCH: Final = (
    "the batch size of a cache is fixed; pass the prompt once for each sequence, and let "
    "reorder_cache exchange sequences"
)
_NOT_TAKEN_BACK: Final = (
    "what was written to blocks is not taken back; call reset, or begin with a new cache"
)
_OWN_COPIES: Final = (
    "what is copied when is part of the module's programs; see SpardaConfig.offload"
)


def check_rows(rows: Any, batch_size: int) -> None:
    """Refuse what does not name, for each sequence of a cache, one that it goes on from.

    Raises:
        KVCacheError: If it is no [batch_size] whole numbers of 0 to batch_size - 1.
    """
    is_whole = isinstance(rows, Tensor) and rows.dtype in (torch.int64, torch.int32)
    if is_whole and rows.shape == (batch_size,):
        low, high = torch.stack(torch.aminmax(rows)).tolist()
        if 0 <= low <= high < batch_size:
            return
    shown = f"{rows.dtype} {rows.tolist()}" if isinstance(rows, Tensor) else repr(rows)
    raise KVCacheError(
        f"beam_idx is {shown}, and the cache holds {batch_size} sequences; pass a tensor "
        f"[{batch_size}] int64 of the sequence that each goes on from, 0 to {batch_size - 1}."
    )


class FixedCache(Cache):
    """Refuses what would take tokens back, change the number of sequences, or copy in part."""

    is_compileable = False
    is_croppable = False

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: blocks that were offloaded are not taken back.

        Raises:
            UnsupportedInputError: Always.
        """
        self._refuse("crop", _NOT_TAKEN_BACK)

    def activate_past_recording(self) -> None:
        """Refuse: it is for tokens that `crop` takes back.

        Raises:
            UnsupportedInputError: Always.
        """
        self._refuse("activate_past_recording", CONFIG["prompt_lookup_num_tokens"].what)

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the memory is that of a number of sequences.

        Raises:
            UnsupportedInputError: Always.
        """
        self._refuse("batch_repeat_interleave", _FIXED_BATCH)

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the memory is that of a number of sequences.

        Raises:
            UnsupportedInputError: Always.
        """
        self._refuse("batch_select_indices", _FIXED_BATCH)

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the module makes the memory.

        Raises:
            UnsupportedInputError: Always.
        """
        self._refuse("early_initialization", "memory is reserved by new_cache(max_tokens)")

    def offload(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: copies are nodes of the module's programs.

        Raises:
            UnsupportedInputError: Always.
        """
        self._refuse("offload", _OWN_COPIES)

    def prefetch(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: copies are nodes of the module's programs.

        Raises:
            UnsupportedInputError: Always.
        """
        self._refuse("prefetch", _OWN_COPIES)

    def _refuse(self, name: str, why: str) -> None:
        raise UnsupportedInputError(f"{name} is not supported: {why}.")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: only an optimized module writes to this cache.

        Raises:
            KVCacheError: Always.
        """
        raise KVCacheError(
            "a SpardaCache was passed to a model that is not optimized; pass it to the module "
            "that made it."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse pickling, and copies that would share memory: it goes back when one is gone."""
        raise UnsupportedInputError(
            "a SpardaCache cannot be pickled, or copied by copy.copy; use copy.deepcopy, or "
            "cache.save(path) and the module's load_cache(path)."
        )
