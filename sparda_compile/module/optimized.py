"""What `optimize` returns: a module with the model's own `forward` and `generate`.

generate   transformers' own loop, on a copy of the model whose forward is ours
forward    many tokens: the prefill program; one token per sequence: the decode program
sparda     graphs, schedules, counts
"""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparda_compile.capture.cache_name import (
    OLD_CACHE_NAME,
    output_with_cache,
    take_cache,
)
from sparda_compile.capture.causal_lm import register_causal_lm
from sparda_compile.errors import KVCacheError
from sparda_compile.forecast.projection import from_tensors, to_tensors
from sparda_compile.module import agreed
from sparda_compile.module.ambient import check_autocast, neutral
from sparda_compile.module.begin import begin_call, begin_generation
from sparda_compile.module.bypasses import check_bypass
from sparda_compile.module.cache import SpardaCache
from sparda_compile.module.calls import (
    check_call,
    named_as,
)
from sparda_compile.module.driver import drive, follow, make_driver
from sparda_compile.module.frozen import FrozenModule
from sparda_compile.module.given_cache import (
    check_owner,
    check_request,
    check_reserved,
    keys_and_values,
)
from sparda_compile.module.inputs import (
    check_holes,
    check_ids,
    check_kept,
    kept_logits,
)
from sparda_compile.module.inspection import Sparda
from sparda_compile.module.pool import CachePool
from sparda_compile.module.positions import Positions
from sparda_compile.module.programs import Programs
from sparda_compile.module.prompt import read_prompt
from sparda_compile.module.saved_cache import CacheFile
from sparda_compile.module.version import Version
from sparda_compile.program.plan import planned_capacity
from sparda_compile.progress import showing
from sparda_compile.runtime.take_over import take_over

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import DynamicCache
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from sparda_compile.config import SpardaConfig
    from sparda_compile.forecast.projection import Projection
    from sparda_compile.program.captures import Captures
    from sparda_compile.program.plan import Plan
    from sparda_compile.program.program import Program
    from sparda_compile.runtime.kv_cache import KVCache
    from sparda_compile.state.layout import CacheLayout

__all__ = ["OptimizedModule"]


class OptimizedModule(FrozenModule):
    """A causal LM whose KV cache is paged, offloaded and read in selected blocks.

    Its parameters are the model's own, under the same names. Made by `sparda_compile.optimize`.

    Args:
        captures: Traced forwards of the model.
        config: What to build.
        forecast: Forecast projections by target layer.
        decode: A plan for the decode of one sequence, if there is one already.
        version: What the model was when it was traced; None is what it is now.
    """

    def __init__(
        self,
        captures: Captures,
        config: SpardaConfig,
        forecast: Mapping[int, Projection],
        decode: Plan | None = None,
        version: Version | None = None,
    ) -> None:
        super().__init__()
        register_causal_lm(OptimizedModule)
        self.captures = captures
        self.sparda_config = config
        self.sparda = Sparda(self)
        self.ranks = captures.ranks
        self._turn = agreed.Turn(captures.ranks)
        self.last_cache: KVCache | None = None
        self._pool = CachePool()
        self._positions = Positions(captures)
        self.version = version or Version(captures.original)
        # The model's own children, under their own names: state_dict has the model's keys.
        self._modules.update(captures.original._modules)
        self._parameters.update(captures.original._parameters)
        self.sparda_forecast = nn.ParameterDict(
            {n: nn.Parameter(w, requires_grad=False) for n, w in to_tensors(forecast).items()}
        )
        projections = from_tensors(dict(self.sparda_forecast))
        self.programs = Programs(captures, config, projections)
        if decode is not None:
            self.programs.put(decode)
        self.training = False
        self._lock = threading.RLock()
        self._generation_config: Any = None
        object.__setattr__(self, "_driver", make_driver(self, captures.original))

    @named_as(lambda module: module.captures.original.forward)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SpardaCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: SpardaCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run one step; the contract of the model's own forward, and its order by position.

        Args:
            input_ids: [B, T] int64, the new tokens.
            attention_mask: [B, past + T], 0 for padding; None means no padding. What it says of
                tokens that are in the cache has to be what it said when they were passed in.
            position_ids: [B, T] int64; None counts on from the columns that were passed in.
            past_key_values: A cache of this module; None starts a new one.
            cache: The same, by the name that transformers gives it from 5.24 on.
            use_cache: Whether to return a cache that is not given; None is what the model's config
                says.
            return_dict: Whether to return an output object and not a tuple; None does.
            logits_to_keep: 0 for all logits, n for those of the last n tokens, or the indices of
                tokens [n] int64.
            **kwargs: Whatever else docs/arguments.md lists, with a value that is not refused.

        Returns:
            Logits [B, T or n, vocabulary] and the cache.

        Raises:
            UnsupportedInputError: If an argument is not supported.
            KVCacheError: If the cache is another module's, of another batch size, broken or full.
        """
        weight = next(self.parameters())
        check_autocast(weight.device.type, weight.dtype)
        ids = check_call(input_ids, kwargs, self.config)
        check_kept(logits_to_keep)
        given = take_cache({OLD_CACHE_NAME: past_key_values, "cache": cache})
        with self._turn.taken(), self._lock, neutral():
            check_ids(ids, self.captures.vocabulary)
            held = self._cache_for(given, ids)
            self._check_model(held, ids)
            logits = self._step(held, ids, attention_mask, position_ids, logits_to_keep)
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True)
        is_returned = use_cache is not False or given is not None
        output = output_with_cache(logits, held if is_returned else None)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output.to_tuple() if return_dict is False else output

    def _check_model(self, cache: SpardaCache, ids: Tensor) -> None:
        """Refuse a step of a model that has changed; see `Version`."""
        is_prefill = ids.shape[1] > 1
        was_checked, cache.is_checked = cache.is_checked, False
        if was_checked or (cache.is_generating and not is_prefill):
            self.version.check_hooks()
            return
        self.version.check(thorough=is_prefill)
        self.version.check_view(self)

    def _step(
        self,
        cache: SpardaCache,
        ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        logits_to_keep: int | Tensor,
    ) -> Tensor:
        """Take in tokens and return the logits that are asked for."""
        with agreed.at_prompt(self.ranks, cache, ids) as facts:
            facts |= agreed.facts_of_call(ids, attention_mask, position_ids, logits_to_keep)
            held = self._ready(cache, ids)
            reading, mask, num_real = begin_call(
                self, cache, held, ids, attention_mask, logits_to_keep
            )
        kv, hides, last_only = reading.kv, reading.may_hide, reading.last_only
        batch_size, num_tokens = ids.shape
        is_decode = num_tokens == 1
        chunks = () if is_decode else reading.chunks()
        positions = self._positions.of(position_ids, mask, cache, hides=hides)
        kv.is_broken = True  # until the step has ended
        with showing(self.sparda_config.progress):
            if is_decode:
                step = self.programs.get("decode", batch_size, kv.layout.max_tokens, last_only=True)
                logits = step(ids.contiguous(), positions, None, kv)
            else:
                self.captures.refresh_joined()  # behind what asks the device: it would wait
                logits = read_prompt(reading, chunks, ids, positions, mask if hides else None)
        kv.advance(num_tokens, num_real)
        kv.is_broken = False
        cache.note(ids, mask, hides=hides)
        if is_decode:
            cache.adapt(step.plan)
        self.last_cache = kv
        return kept_logits(logits, logits_to_keep, is_cut=last_only and num_tokens > 1)

    @named_as(lambda module: module.captures.original.generate)
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate tokens; the contract of the model's own `generate`, and its order by position.

        Args:
            inputs: [B, T] int64 prompt; or pass `input_ids`.
            **kwargs: As for transformers' `generate`. `past_key_values`, or `cache`, may be a cache
                of this module, from an earlier call, whose tokens `input_ids` begins with.

        Returns:
            As transformers' `generate`.

        Raises:
            UnsupportedInputError: If docs/arguments.md refuses an argument, wherever it is set.
            KVCacheError: If the prompt and the new tokens do not fit `max_tokens`.
        """
        with self.ranks.together("generate") as facts:
            with self._lock, neutral():
                self.version.check(thorough=True)
                self.version.check_view(self)
            cache, wants_cache = begin_generation(self, inputs, kwargs, facts)
        if inputs is not None:
            kwargs["inputs"] = inputs
        if not self.ranks.is_alone and facts["do_sample"]:
            self.ranks.share_random_state(next(self.parameters()).device)
        follow(self._driver, self.captures.original, self.generation_config)
        with self._turn.taken():
            output = drive(self._driver, cache, wants_cache, kwargs)
        self.last_cache = cache.kv  # a second text of guidance_scale has another
        agreed.check_same_text(self.ranks, output)
        return output

    @property
    def generation_config(self) -> Any:
        """What `generate` takes where a call does not say; the model's own until it is assigned."""
        own = self._generation_config
        return self.captures.original.generation_config if own is None else own

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        is_models = config is self.captures.original.generation_config
        self._generation_config = None if is_models else config

    @property
    def config(self) -> Any:
        """The model's own config; to assign one is to assign it to the model."""
        return self.captures.original.config

    @config.setter
    def config(self, config: Any) -> None:
        self.captures.original.config = config

    def program(self, phase: str, batch_size: int, max_tokens: int, *, last_only: bool) -> Program:
        """Return the program for a shape; see `Programs.get`."""
        return self.programs.get(phase, batch_size, max_tokens, last_only=last_only)

    def new_cache(
        self,
        max_tokens: int | None = None,
        *,
        past: DynamicCache | SpardaCache | None = None,
        attention_mask: Tensor | None = None,
    ) -> SpardaCache:
        """Return a cache to pass as `past_key_values` or `cache`, kept across turns.

        Args:
            max_tokens: Tokens per sequence to reserve; None is `SpardaConfig.max_tokens`.
            past: A cache that the model itself filled, or that of another module optimized from
                it, so that what it has read is not read again; keys and values are copied. None
                begins an empty one.
            attention_mask: [B, T] for the T tokens of `past`, 0 for padding; None means none.

        Raises:
            ConfigError: If `max_tokens` is no number of tokens.
            KVCacheError: If `past` is of another model, another kind or empty, or does not fit.
        """
        check_request(max_tokens, past, attention_mask)
        tokens = past.get_seq_length() + 1 if past is not None else 1
        reserve = max_tokens or max(planned_capacity(self.sparda_config), tokens)
        check_reserved(self.sparda_config, max(reserve, tokens))
        cache = SpardaCache(self, self.programs.capacity(max(reserve, tokens)))
        if past is not None:
            with self._lock, neutral():
                keys_values, mask = keys_and_values(past, attention_mask, self.captures)
                check_holes(mask, self.captures.windows.values())
                take_over(self._ready(cache, mask), keys_values, mask)
                cache.note_past(past, mask)
        return cache

    def load_cache(self, path: str | Path, max_tokens: int | None = None) -> SpardaCache:
        """Return a cache that `SpardaCache.save` wrote, to go on as if it had not been saved.

        Args:
            path: The file.
            max_tokens: Tokens per sequence to reserve; None is as many as when it was saved.

        Raises:
            UnsupportedInputError: If several ranks share the model.
            ConfigError: If `max_tokens` is no number of tokens.
            KVCacheError: If there is no such file, it is of another model, other weights or other
                settings, or has room for more tokens than `SpardaConfig.max_tokens`.
        """
        agreed.check_whole(self.ranks, "load_cache")
        check_request(max_tokens)
        file = CacheFile.open(path)
        reserve = max(file.info.max_tokens, max_tokens or 1)
        check_reserved(self.sparda_config, reserve)
        with self._lock, neutral():
            cache = SpardaCache(self, self.programs.capacity(reserve))
            decode = self._decode(cache, file.info.batch_size)
            saved = dataclasses.replace(decode.plan.layout, max_tokens=file.info.max_tokens)
            file.info.check(self.captures.original, saved)
            cache.take(file, self._reserve(cache, saved))
            if cache.kv is not None and saved != decode.plan.layout:
                cache.hold(cache.kv.grow(decode.plan.layout))
        return cache

    def lend_copy(self, kv: KVCache, to: SpardaCache) -> None:
        """Let a cache hold a copy of another one's memory."""
        with self._lock, neutral():
            self._pool.lend(kv.grow(kv.layout), to)

    def __getattr__(self, name: str) -> Any:
        """Return what the model itself has: config, generation_config, device, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("captures", "_driver"):
                raise
            check_bypass(name)
            return getattr(self.captures.original, name)

    def _cache_for(self, cache: SpardaCache | None, ids: Tensor) -> SpardaCache:
        if cache is None:
            check_reserved(self.sparda_config, ids.shape[1])
            return SpardaCache(self, self.programs.capacity(ids.shape[1] + 1))
        check_owner(cache, self)
        return cache

    def _decode(self, cache: SpardaCache, batch_size: int) -> Program:
        return self.programs.get("decode", batch_size, cache.max_tokens, last_only=True)

    def _reserve(self, cache: SpardaCache, layout: CacheLayout) -> KVCache:
        device, progress = next(self.parameters()).device, self.sparda_config.progress
        if self._pool.lets_go_of(self.last_cache, layout):
            self.last_cache = None  # else the memory of both would be taken at once
        kv = self._pool.take(layout, device, progress=progress)
        self._pool.lend(kv, cache)
        return kv

    def _ready(self, cache: SpardaCache, ids: Tensor) -> KVCache:
        """Return the cache's state, made or grown if need be."""
        batch_size, num_tokens = ids.shape
        if cache.kv is None:
            decode = self._decode(cache, batch_size)
            self._reserve(cache, decode.plan.layout)
            decode.compile_kernels()  # while the prompt is read
        assert cache.kv is not None
        kv = cache.kv
        if kv.layout.batch_size != batch_size:
            raise KVCacheError(
                f"the cache holds {kv.layout.batch_size} sequences but this call passes "
                f"{batch_size}; every turn must have the batch size of the first."
            )
        needed = kv.longest + num_tokens
        if needed > kv.layout.max_tokens and self.sparda_config.max_tokens is None:
            capacity = self.programs.capacity(max(needed, 2 * kv.layout.max_tokens))
            plan = self.programs.get("decode", batch_size, capacity, last_only=True).plan
            kv = kv.grow(plan.layout)
            cache.hold(kv)
        elif num_tokens == 1:
            kv.check_room(1)
        return kv
