"""SpardaCache: a conversation's KV cache in the form that transformers passes around."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers.cache_utils import Cache

from sparda_compile.errors import KVCacheError, UnsupportedInputError
from sparda_compile.module.agreed import check_whole
from sparda_compile.module.budgets import Budgets
from sparda_compile.module.saved_cache import SavedCache, write_cache
from sparda_compile.runtime.kv_cache import check_budgets
from sparda_compile.state.layout import LENGTHS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from sparda_compile.module.saved_cache import CacheFile
    from sparda_compile.program.plan import Plan
    from sparda_compile.runtime.kv_cache import KVCache

__all__ = ["SpardaCache"]

# Calls that are remembered one by one before they are put together.
_MOST_PARTS: Final = 256


class SpardaCache(Cache):
    """A conversation's KV cache, as transformers passes it around.

    Args:
        owner: The optimized module that it belongs to.
        max_tokens: Tokens per sequence to reserve.

    Attributes:
        has_padding: Whether some token that was passed in is hidden.
        is_generating: Whether `generate` runs on it, which looks at masks once for all its steps.
        is_checked: Whether `generate` has just looked at the model, for the step that comes now.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, owner: nn.Module, max_tokens: int) -> None:
        super().__init__(layers=[])
        self.owner = weakref.ref(owner)
        self.max_tokens = max_tokens
        self._held: list[KVCache] = []  # the pool's finalizer holds the same list
        self._budgets: dict[int, int] = {}
        self._adaptation: Budgets | None = None
        self._passed: list[tuple[Tensor | None, Tensor]] = []
        self.has_padding = False
        self.is_generating = False
        self.is_checked = False

    @property
    def kv(self) -> KVCache | None:
        """The memory, None before the first call."""
        return self._held[0] if self._held else None

    def hold(self, kv: KVCache) -> list[KVCache]:
        """Take over memory, in the place of any other; returns the list that holds it."""
        if self._budgets:
            kv.set_budgets(self._budgets)
        self._held[:] = [kv]
        return self._held

    def set_budgets(self, budgets: Mapping[int, int]) -> None:
        """Set how many blocks layers predict for each step, in mode `speculate`.

        It may be called between any two steps, and nothing is compiled or captured anew. What a
        step returns does not change with it, but for `repair="union"`. `reset` keeps it.

        Args:
            budgets: By layer, for each sequence and KV head: 0 up to what
                `SpardaConfig.speculation_budget` allows, sink, local and current blocks among them.
                A layer that is not named keeps its own.

        Raises:
            ConfigError: If the mode predicts nothing, a layer does not, or a number is not allowed.
        """
        if self.kv is not None:
            self.kv.set_budgets(budgets)
        else:
            owner: Any = self.owner()
            layout = owner.programs.latest_plan("decode").layout
            check_budgets(dataclasses.replace(layout, max_tokens=self.max_tokens), budgets)
        self._budgets |= budgets
        if self._adaptation is not None:
            self._adaptation.fix(budgets)

    @property
    def budgets(self) -> dict[int, int]:
        """Blocks that each layer predicts for a step now, by layer; {} before the first step."""
        kept = {} if self._adaptation is None else self._adaptation.controls
        return {layer: control.budget for layer, control in kept.items()} | self._budgets

    def adapt(self, plan: Plan) -> None:
        """Let budgets follow the text; called behind each decode step, of this plan."""
        if not plan.speculated or self.kv is None:
            return
        if self._adaptation is None or self._adaptation.kv is not self.kv:
            self._adaptation = Budgets(plan, self.kv, self._budgets)
        self._adaptation.step()

    def save(self, path: str | Path) -> Path:
        """Write the conversation's state to a file, for `load_cache` of the module.

        What is loaded goes on as if it had not been saved: keys, values and tables, what selectors,
        hints and predictors keep, counts, and the tokens that were passed in. The file is of
        safetensors, `saved_cache.py` says what is in it. To write it takes as much CPU memory again
        as the file is long.

        Args:
            path: Of the file; its folders are made, an old file is replaced at once.

        Returns:
            The path.

        Raises:
            UnsupportedInputError: If several ranks share the model.
            KVCacheError: If no token is in the cache, or a step began and did not end.
            ConfigError: If the file cannot be written.
        """
        if self.kv is None or not self.kv.num_columns:
            raise KVCacheError(
                "the cache holds no token, so there is nothing to save; pass it to the module's "
                "generate or forward first."
            )
        self.kv.check_ended()
        owner: Any = self.owner()
        check_whole(owner.ranks, "SpardaCache.save")
        self._join_parts()
        info = SavedCache.of(
            owner.captures.original,
            self.kv,
            has_padding=self.has_padding,
            budgets={str(layer): int(blocks) for layer, blocks in self._budgets.items()},
            num_passed=len(self._passed),
        )
        return write_cache(path, info, self.kv, self._passed)

    def take(self, file: CacheFile, kv: KVCache) -> None:
        """Take over what a file holds.

        Args:
            file: The file.
            kv: Memory that this cache holds, empty.
        """
        file.restore(kv)
        device = kv.state[LENGTHS].device
        self._budgets = {int(layer): blocks for layer, blocks in file.info.budgets.items()}
        self._passed = [
            (None if ids is None else ids.to(device), mask.to(device)) for ids, mask in file.passed
        ]
        self.has_padding = file.info.has_padding

    def note(self, ids: Tensor | None, mask: Tensor, *, hides: bool) -> None:
        """Remember the tokens of a call that has ended.

        Args:
            ids: [B, T] int64; None where they are not known.
            mask: [B, T] bool, which of them are real.
            hides: Whether the mask hides some.
        """
        self.has_padding |= hides
        # A view would keep the whole text alive, once for each step.
        self._passed.append((ids if ids is None or ids._base is None else ids.clone(), mask))
        if len(self._passed) > _MOST_PARTS:
            self._join_parts()

    def note_past(self, past: Any, mask: Tensor) -> None:
        """Remember the tokens of a cache whose keys and values were taken over.

        Args:
            past: The cache; one of transformers does not say which tokens they are.
            mask: [B, T] bool, which of them are real.
        """
        if not isinstance(past, SpardaCache):
            self.note(None, mask, hides=not bool(mask.all()))
            return
        self._passed, self.has_padding = [*past._passed], past.has_padding

    @property
    def passed_mask(self) -> Tensor:
        """Which of the tokens that were passed in are real, [B, T] bool."""
        return torch.cat([mask for _, mask in self._passed], dim=1)

    def _join_parts(self) -> None:
        """Put what is remembered together, if all of it is known."""
        known = [(ids, mask) for ids, mask in self._passed if ids is not None]
        if known and len(known) == len(self._passed):
            ids, masks = (torch.cat(parts, dim=1) for parts in zip(*known, strict=True))
            self._passed = [(ids, masks)]

    def check_mask(self, attention_mask: Tensor) -> None:
        """Refuse a mask that hides, or shows, tokens of earlier calls otherwise than they did.

        Args:
            attention_mask: [B, columns + T].

        Raises:
            UnsupportedInputError: If it does.
        """
        if not self._passed:
            return
        device = attention_mask.device
        passed = torch.cat([mask.to(device) for _, mask in self._passed], dim=1)
        # One look at the device, not one for each call.
        if torch.equal(attention_mask[:, : passed.shape[1]].bool(), passed):
            return
        begin = 0
        for _, mask in self._passed:
            end = begin + mask.shape[1]
            if not torch.equal(attention_mask[:, begin:end].bool().to(mask.device), mask):
                raise UnsupportedInputError(
                    f"attention_mask changes what columns {begin} to {end - 1} were when they were "
                    "passed in; keys in the cache cannot be hidden or shown later. Pass the same "
                    "entries again, or start a new cache."
                )
            begin = end

    def check_ids(self, ids: Tensor) -> None:
        """Refuse a conversation whose earlier tokens are not those of the cache.

        Args:
            ids: [B, columns or more] int64, the whole conversation.

        Raises:
            KVCacheError: If a token differs.
        """
        begin = 0
        for known, mask in self._passed:
            end = begin + mask.shape[1]
            if known is not None:
                differs = (ids[:, begin:end].to(known.device) != known) & mask
                if bool(differs.any()):
                    row, column = (int(n) for n in differs.nonzero()[0])
                    raise KVCacheError(
                        f"input_ids differs from the tokens of the cache, first at token "
                        f"{begin + column} of sequence {row}; the cache belongs to another text. "
                        "Pass the conversation as it was, or start a new cache."
                    )
            begin = end

    def reset(self) -> None:
        """Forget every token; memory stays."""
        self._passed.clear()
        self.has_padding = False
        if self.kv is not None:
            self.kv.reset()
            self._adaptation = None
            self.hold(self.kv)  # with its budgets

    @property
    def is_linear(self) -> list[bool]:
        """No layer is recurrent: `generate` passes on only the tokens that are not in the cache."""
        return [False]

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Return the tokens per sequence that were passed in, padding included."""
        del layer_idx
        return self.kv.num_columns if self.kv else 0

    def get_max_cache_shape(self, layer_idx: int | None = 0) -> int:
        """Return the tokens per sequence that the cache holds."""
        del layer_idx
        return self.kv.layout.max_tokens if self.kv else self.max_tokens

    get_max_length = get_max_cache_shape

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each sequence go on from another one's tokens; beam search calls it in each step.

        Args:
            beam_idx: [B] int64, the sequence whose tokens each one takes over.
        """
        if self.kv is None:
            return
        self.kv.is_broken = True  # until every row is where it belongs
        self.kv.reorder(beam_idx)
        self._join_parts()
        self._passed = [
            (None if ids is None else ids[beam_idx.to(ids.device)], mask[beam_idx.to(mask.device)])
            for ids, mask in self._passed
        ]
        self.kv.is_broken = False

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: blocks that were offloaded are not taken back.

        Raises:
            UnsupportedInputError: Always.
        """
        raise UnsupportedInputError(
            "crop is not supported: what was written to blocks is not taken back. Call reset, or "
            "begin with a new cache."
        )

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: only an optimized module writes to this cache.

        Raises:
            KVCacheError: Always.
        """
        raise KVCacheError(
            "a SpardaCache was passed to a model that is not optimized; pass it to the module "
            "that made it."
        )

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.kv.layout.layers) if self.kv else 0
