"""The programs that read a prompt or a turn: `generate` of optimized modules, and the model's own.

    sparse_forecast        mode forecast, prefill="sparse", KV cache in CPU memory
    sparse_query           mode query, prefill="sparse", KV cache in CPU memory
    sparse_resident        mode forecast, prefill="sparse", KV cache on the GPU
    dense                  mode forecast, prefill="dense", KV cache in CPU memory
    transformers_cudnn     transformers' dynamic cache on the GPU, SDPA by cuDNN
    transformers_flash     the same, SDPA by FlashAttention
    transformers_efficient the same, SDPA by the memory-efficient kernel: it takes a mask

`compare` holds the logits of ours against the model's own where each token reads all of its blocks.
A sparse program runs for a prompt with one more column than all blocks have tokens; so the first of
its new columns is hidden, and what is left is as many tokens as all blocks have.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StoppingCriteriaList

from sparda_compile.api import optimize
from sparda_compile.bench.memory import free_everything
from sparda_compile.bench.start_child import Stopwatch
from sparda_compile.bench.timing import wait_for
from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import DevicePoolFullError, HostPoolFullError
from sparda_compile.program.prompt_cost import prompt_phase
from sparda_compile.ranks.agreement import ranks_of
from sparda_compile.ranks.shards import local_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from sparda_compile.module.optimized import OptimizedModule

__all__ = [
    "BACKENDS",
    "NO_MEMORY",
    "OURS",
    "OURS_OFFLOADED",
    "PREFILL_BACKENDS",
    "REPEAT",
    "PromptPrograms",
    "fill_dynamic",
    "out_of_memory",
    "prompt_of",
    "same_chunks",
    "token_times",
]

OURS: Final[dict[str, dict[str, str]]] = {
    "sparse_forecast": {"mode": "forecast", "prefill": "sparse"},
    "sparse_query": {"mode": "query", "prefill": "sparse"},
    "dense": {"mode": "forecast", "prefill": "dense"},
    "sparse_resident": {"mode": "forecast", "prefill": "sparse", "offload": "never"},
}
# What is measured where nothing is named: the other one says what offload costs.
OURS_OFFLOADED: Final = tuple(name for name, fields in OURS.items() if "offload" not in fields)
BACKENDS: Final = {
    "transformers_cudnn": SDPBackend.CUDNN_ATTENTION,
    "transformers_flash": SDPBackend.FLASH_ATTENTION,
    "transformers_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_OTHERS: Final = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
# A prompt without a past needs no mask, and these are the fastest there.
PREFILL_BACKENDS: Final = ("transformers_cudnn", "transformers_flash")
NO_MEMORY: Final = (torch.OutOfMemoryError, DevicePoolFullError, HostPoolFullError)
# Of the norm of logits: more than two orders of summing in bf16 differ by, and less than what a
# program that reads other blocks does.
_ROUNDING: Final = 0.1
_CHECKED_TOKENS: Final = 1024
# Of a random model, tokens drawn one by one select blocks that have nothing to do with each other.
# Of equal tokens in a row two neighbours share about as much as in a trained model, whose 87 to 94%
# by intersection over union (docs/benchmarks.md) are 93 to 97% of a token's blocks; `sharing.py`.
REPEAT: Final = 14
# Tokens of the text, and of a past, that torch is asked with.
_PROBED: Final = 64


def token_times(
    generate: Callable[..., Any], ids: Tensor, num_new: int, **more: Any
) -> list[float]:
    """Generate greedily; return the seconds to each new token after the one before.

    Args:
        generate: Of an optimized module, or of a model.
        ids: [1, T] int64, the whole text.
        num_new: Tokens to generate.
        **more: Further arguments of `generate`.
    """
    wait_for(ids.device)
    clock = Stopwatch()
    generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_new,
        do_sample=False,
        streamer=clock,
        **more,
    )
    return [after - before for before, after in pairwise(clock.times)]


def out_of_memory(error: BaseException) -> str:
    """Return why there is no result, of one of `NO_MEMORY`."""
    return f"out of memory: {str(error).splitlines()[0]}"


def same_chunks(name: str, row: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Return whether a program's row was measured in the chunks that settings ask for, if they do.

    So a length that only fits in chunks can be added to a file, and stays there.
    """
    wanted = settings.get("chunk_tokens")
    return name not in OURS or wanted is None or row.get("chunk_tokens") == wanted


def prompt_of(num_tokens: int, vocabulary: int, device: torch.device, repeat: int = 1) -> Tensor:
    """Return random tokens, [1, T] int64, always the same ones.

    Args:
        num_tokens: T.
        vocabulary: Tokens to draw from.
        device: Where they are wanted.
        repeat: How often each one that is drawn stands in a row.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, vocabulary, (1, -(-num_tokens // repeat)), generator=generator)
    return drawn.repeat_interleave(repeat, dim=1)[:, :num_tokens].to(device)


def fill_dynamic(model: nn.Module, num_tokens: int) -> DynamicCache:
    """Return a cache of one sequence with random keys and values, always the same ones.

    Args:
        model: On the device where the cache is used. Of one that is sharded, the cache has this
            rank's KV heads.
        num_tokens: Tokens that it holds.
    """
    config: Any = model.config
    weight = next(model.parameters())
    num_groups = config.num_key_value_heads // ranks_of(model).size
    size = (1, num_groups, num_tokens, config.head_dim)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        generator = torch.Generator(device=weight.device).manual_seed(layer)
        keys, values = (
            torch.randn(size, generator=generator, dtype=weight.dtype, device=weight.device)
            for _ in range(2)
        )
        cache.update(keys, values, layer)
    return cache


class PromptPrograms:
    """The programs of one model; ours are made when they are asked for, and traced once.

    Args:
        model: A causal LM of transformers with random weights. Its `generation_config` loses the
            token that ends a text: random weights could choose it.
        say: Told what is going on.
        **settings: Fields of SpardaConfig for ours.

    Attributes:
        weight_bytes: Of the model, of this rank's part of one that is sharded.
    """

    def __init__(self, model: nn.Module, say: Callable[[str], None], **settings: Any) -> None:
        self.model: Any = model
        generation_config: Any = self.model.generation_config
        generation_config.eos_token_id = None
        self.say = say
        self.settings = settings
        self.device = next(model.parameters()).device
        self.weight_bytes = sum(local_of(p).nbytes for p in model.parameters())
        self._ours: dict[str, OptimizedModule] = {}
        self._allowed: dict[tuple[str, int, bool], str | None] = {}

    @property
    def vocabulary(self) -> int:
        """Tokens."""
        return int(self.model.config.vocab_size)

    @cached_property
    def _traced(self) -> OptimizedModule:
        self.say("tracing the model")
        return optimize(self.model, SpardaConfig(mode="dense", lowering="eager"))

    def configure(self, **settings: Any) -> None:
        """Let all modules go; those to come have these fields of SpardaConfig."""
        self.drop()
        self.settings = settings

    def config(self, name: str) -> SpardaConfig:
        """Return the configuration of one of `OURS`; candidates are of those by the query alone."""
        fields: dict[str, Any] = {**OURS[name], **self.settings}
        if fields["mode"] == "forecast":
            fields.pop("prefill_candidates", None)
        return SpardaConfig(**fields)

    def ours(self, name: str) -> OptimizedModule:
        """Return the module of one of `OURS`, made if it is not there."""
        if name not in self._ours:
            traced = self._traced
            self.say(f"optimizing {name}")
            self._ours[name] = optimize(traced, self.config(name))
        return self._ours[name]

    def auto(self, num_tokens: int) -> str:
        """Return what `prefill="auto"` makes of a prompt in mode forecast: `dense` or `sparse`."""
        config = self.config("sparse_forecast").replace(prefill="auto")
        phase = prompt_phase(self._traced.captures, config, 1, 0, num_tokens)
        return "sparse" if phase == "sparse_prefill" else "dense"

    def drop(self) -> None:
        """Let all modules go, and the memory of their caches."""
        self._ours.clear()
        free_everything()

    def generate(self, name: str, ids: Tensor, num_new: int, **more: Any) -> list[float]:
        """Generate with a program that `forbids` has nothing against; see `token_times`."""
        if name in OURS:
            return token_times(self.ours(name).generate, ids, num_new, **more)
        # Some have no attention for a single token: the steps behind a prompt may take another.
        with sdpa_kernel([BACKENDS[name], *_OTHERS], set_priority=True):
            return token_times(self.model.generate, ids, num_new, **more)

    def first_token(self, name: str, ids: Tensor, num_new: int) -> list[float]:
        """Generate with a cache for so many tokens, and stop behind the first one."""
        criteria = StoppingCriteriaList([_at_once])
        return self.generate(name, ids, num_new, stopping_criteria=criteria)

    def kv_bytes(self, name: str, *, on_host: bool) -> int:
        """Return what the cache of a program's last call takes; 0 for transformers' caches."""
        cache = self.ours(name).last_cache if name in OURS else None
        return 0 if cache is None else cache.layout.num_bytes(on_host=on_host)

    def forbids(self, name: str, num_tokens: int, *, with_past: bool) -> str | None:
        """Return why torch has no such attention for a text, None if it has; ours always have.

        Args:
            name: A program.
            num_tokens: New tokens; whether they are one or more decides.
            with_past: Whether a cache holds tokens before them.
        """
        key = (name, 1 if num_tokens == 1 else _PROBED, with_past)
        if name in BACKENDS and key not in self._allowed:
            self._allowed[key] = self._probe(*key)
        return self._allowed.get(key)

    def _probe(self, name: str, num_tokens: int, with_past: bool) -> str | None:
        past = {CACHE_NAME: fill_dynamic(self.model, _PROBED)} if with_past else {}
        ids = prompt_of(_PROBED * with_past + num_tokens, self.vocabulary, self.device)
        try:
            with torch.no_grad(), sdpa_kernel(BACKENDS[name]):
                self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, **past
                )
        except RuntimeError as error:
            if isinstance(error, NO_MEMORY):
                raise
            reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
            return f"torch has no such attention here: {reason}"
        return None

    @torch.no_grad()
    def compare(
        self, name: str, num_tokens: int, reserve: int, *, with_past: bool
    ) -> dict[str, Any]:
        """Hold the logits of one of `OURS` against the model's own, where all blocks are read.

        Args:
            name: A program of `OURS`.
            num_tokens: Most new tokens.
            reserve: Tokens per sequence that the cache holds; what is measured has as many.
            with_past: Whether both begin from a cache with the same keys and values.

        Returns:
            `phase` that was compared, `tokens`, `relative_difference` and `same_token`.

        Raises:
            AssertionError: If they differ by more than rounding, or another program ran.
        """
        fast = self.ours(name)
        past, columns, hides = _sizes(self.config(name), name, num_tokens, with_past)
        ids = prompt_of(past + columns, self.vocabulary, self.device)
        before = fast.sparda.num_compilations
        logits = self._ours_at(fast, ids, past, reserve, hides=hides)
        own = self._theirs_at(ids, past, hidden=int(hides))
        difference = float((logits - own).norm() / own.norm())
        phase = "decode" if columns == 1 else "sparse_prefill" if hides else "prefill"
        after = fast.sparda.num_compilations
        if not after.get(phase):
            raise AssertionError(f"{name} ran {before}, then {after}, and never a {phase}")
        if not difference <= _ROUNDING:
            raise AssertionError(
                f"{name} and the model differ by {difference:.3f} in the logits of {columns} "
                f"tokens behind {past}, where both read all blocks"
            )
        return {
            "phase": phase,
            "tokens": columns - hides,
            "past": past,
            "relative_difference": round(difference, 5),
            "same_token": bool(logits.argmax() == own.argmax()),
        }

    def _ours_at(
        self, fast: OptimizedModule, ids: Tensor, past: int, reserve: int, *, hides: bool
    ) -> Tensor:
        """Return the logits of the last token, fp32; the first new column may be hidden."""
        filled = fill_dynamic(self.model, past) if past else None
        given: dict[str, Any] = {CACHE_NAME: fast.new_cache(reserve, past=filled)}
        mask = torch.ones_like(ids)
        mask[:, past] = int(not hides)
        positions = torch.arange(past, ids.shape[1], device=self.device) - int(hides)
        out = fast(
            ids[:, past:],
            attention_mask=mask,
            position_ids=positions.clamp(min=0)[None],
            logits_to_keep=1,
            **given,
        )
        logits: Tensor = out.logits[0, -1].float()
        return logits

    def _theirs_at(self, ids: Tensor, past: int, hidden: int) -> Tensor:
        """Return the model's own logits of the last token, fp32, without what is hidden."""
        given: dict[str, Any] = {CACHE_NAME: fill_dynamic(self.model, past)} if past else {}
        out = self.model(ids[:, past + hidden :], logits_to_keep=1, use_cache=bool(past), **given)
        logits: Tensor = out.logits[0, -1].float()
        return logits


def _at_once(ids: Tensor, scores: Any, **_: Any) -> Tensor:
    return torch.ones(len(ids), dtype=torch.bool, device=ids.device)


def _sizes(
    config: SpardaConfig, name: str, num_tokens: int, with_past: bool
) -> tuple[int, int, bool]:
    """Return tokens of the past, new columns, and whether the first of them is hidden."""
    begins = config.selection_starts_at
    is_sparse = OURS[name]["prefill"] == "sparse"
    assert begins is not None  # each of them selects
    if not with_past:
        columns = min(num_tokens, begins if is_sparse else _CHECKED_TOKENS)
        return 0, columns, is_sparse and columns == begins
    columns = min(num_tokens, _CHECKED_TOKENS, begins // 2)
    if columns == 1:
        return begins - 2, 1, False  # with it, all blocks are read
    if is_sparse:
        return begins - columns, columns, True
    return min(_CHECKED_TOKENS, begins - columns), columns, False
