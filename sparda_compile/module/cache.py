"""SpardaCache: a conversation's KV cache in the form that transformers passes around."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from sparda_compile.errors import KVCacheError, UnsupportedInputError
from sparda_compile.module.arguments import CONFIG
from sparda_compile.module.budgets import Budgets
from sparda_compile.runtime.held import HeldKeysValues
from sparda_compile.runtime.kv_cache import check_budgets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from sparda_compile.program.captures import Captures
    from sparda_compile.program.plan import Plan
    from sparda_compile.runtime.kv_cache import KVCache

__all__ = ["SpardaCache", "keys_and_values"]

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
            f"crop is not supported: {CONFIG['prompt_lookup_num_tokens'].what}."
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


def keys_and_values(
    past: Any, attention_mask: Tensor | None, captures: Captures | None = None
) -> tuple[Mapping[int, tuple[Tensor, Tensor]], Tensor]:
    """Return what a cache holds.

    Args:
        past: A DynamicCache that a model filled, or a cache of a module that was optimized from it.
        attention_mask: [B, T] of its tokens, 0 for padding; None means no padding. A cache of an
            optimized module knows its own.
        captures: Of the module that takes over, which a cache of an optimized module has to share.

    Returns:
        Keys and values [B, G, T, D] by layer, and a mask [B, T] bool of the real tokens.

    Raises:
        KVCacheError: If it is another kind of cache, or empty, or the mask is of another size; or
            that of another model, or of a step that did not end.
    """
    if isinstance(past, SpardaCache):
        return _held_by(past, attention_mask, captures)
    layers = getattr(past, "layers", [])
    if not isinstance(past, DynamicCache) or not all(isinstance(x, DynamicLayer) for x in layers):
        kinds = ", ".join(sorted({type(x).__name__ for x in layers})) or "no layers"
        raise KVCacheError(
            f"past is a {type(past).__name__} with {kinds}; pass a DynamicCache of plain or "
            "sliding-window layers, which is what model(input_ids, use_cache=True) returns."
        )
    num_tokens = past.get_seq_length()
    if not num_tokens:
        raise KVCacheError("past holds no token; leave it out to begin with an empty cache.")
    first: Any = layers[0]
    mask = torch.ones(first.keys.shape[0], num_tokens, dtype=torch.bool, device=first.keys.device)
    if attention_mask is not None:
        if attention_mask.shape != mask.shape:
            raise KVCacheError(
                f"attention_mask has shape {tuple(attention_mask.shape)} but past holds "
                f"{tuple(mask.shape)} tokens; pass one entry for each, 0 for padding."
            )
        mask = attention_mask.bool()
    return {number: (x.keys, x.values) for number, x in enumerate(layers)}, mask


def _held_by(
    past: SpardaCache, attention_mask: Tensor | None, captures: Captures | None
) -> tuple[Mapping[int, tuple[Tensor, Tensor]], Tensor]:
    owner: Any = past.owner()
    if owner is None or owner.captures is not captures:
        raise KVCacheError(
            "past is a cache of another model; pass one of a module that was optimized from the "
            "same, as optimize(fast, config) does, while that module is there."
        )
    if attention_mask is not None:
        raise KVCacheError(
            "attention_mask is for a cache that the model itself filled; one of an optimized "
            "module knows which of its tokens are padding. Leave it out."
        )
    if past.kv is None or not past.kv.num_columns:
        raise KVCacheError("past holds no token; leave it out to begin with an empty cache.")
    if past.kv.is_broken:
        raise KVCacheError(
            "the last step on past began and did not end, so nobody knows what it holds. Leave it "
            "out, and pass the whole text again."
        )
    mask = past.passed_mask
    return HeldKeysValues(past.kv, mask), mask
