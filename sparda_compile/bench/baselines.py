"""What a user of transformers has today, on the same model and in the same run.

    static               StaticCache on the GPU, torch.compile(mode="reduce-overhead")
    offloaded            StaticCache(offloading=True), run eagerly: whole layers come and go
    offloaded_repaired   the same with the missing wait, where its logits need one

transformers 5.17 prefetches a layer without waiting for the copy that writes it, and for the
attention that still reads the memory which the prefetch reuses; newer versions wait. So logits are
compared before anything is timed, with those of the static cache run eagerly. What is right differs
from them by rounding, as the compiled static cache does. If they differ by more, and by more than
twice what two eager runs differ by, `offloaded` is reported as wrong, and a repaired one is timed
beside it: `wait` is what newer versions do, `synchronize` stops the CPU at each layer.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import StaticCache

from sparda_compile.bench.memory import dense_kv_bytes, free_everything, too_big
from sparda_compile.bench.timing import Spread, time_calls, wait_for
from sparda_compile.capture.cache_name import CACHE_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from sparda_compile.bench.decode import DecodeBench
    from sparda_compile.bench.memory import FreeMemory
    from sparda_compile.bench.shapes import ModelShape

__all__ = ["OVERLAP", "OffloadedCache", "StaticDecode", "bench_baselines", "fill_static", "summary"]

OVERLAP: Final = 0.9
_REPAIRS: Final = ("none", "wait", "synchronize")
_COMPARED: Final = 8
_WARM: Final = 4


class OffloadedCache(StaticCache):
    """transformers' offloaded cache; `repair` says what to wait for before each layer.

    Args:
        model: Whose cache it is.
        max_tokens: Tokens per sequence.
        repair: `none`, `wait` or `synchronize`.
    """

    def __init__(self, model: nn.Module, max_tokens: int, repair: str) -> None:
        super().__init__(config=_config(model), max_cache_len=max_tokens, offloading=True)
        self.repair = repair

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Wait, then do as transformers does."""
        if self.repair == "wait":
            self.prefetch_stream.wait_stream(torch.cuda.default_stream(key_states.device))
        elif self.repair == "synchronize":
            torch.cuda.synchronize(key_states.device)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class StaticDecode:
    """Decode of one token with one of transformers' static caches.

    Args:
        forward: The model, or what compiles it.
        cache: Filled.
        input_ids: [B, 1].
        num_tokens: Tokens per sequence at the first step.
    """

    def __init__(
        self, forward: Callable[..., Any], cache: StaticCache, input_ids: Tensor, num_tokens: int
    ) -> None:
        self.forward = forward
        self.cache = cache
        self.input_ids = input_ids
        self.num_tokens = num_tokens

    def __call__(self) -> Tensor:
        """Take one step; returns logits, [B, 1, vocabulary]."""
        with torch.no_grad():
            out = self.forward(input_ids=self.input_ids, **{CACHE_NAME: self.cache})
        logits: Tensor = out.logits
        return logits

    def rewind(self) -> None:
        """Go back to the first step."""
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(self.num_tokens)

    def logits(self) -> Tensor:
        """Return the logits of the first steps, [steps, B, 1, vocabulary] fp32."""
        self.rewind()
        return torch.stack([self().float().clone() for _ in range(_COMPARED)])

    def turn(self, steps: int) -> list[float]:
        """Return the times of so many steps, microseconds; they begin at the first step."""
        self.rewind()
        for _ in range(_WARM):
            self()
        return time_calls(self, steps)


def fill_static(cache: StaticCache, model: nn.Module, batch_size: int) -> StaticCache:
    """Allocate a cache and fill it with random keys and values, always the same ones.

    Args:
        cache: Empty, of the model.
        model: On the device where the cache is used.
        batch_size: Sequences.

    Returns:
        The cache.
    """
    config = _config(model)
    weight = next(model.parameters())
    cache.early_initialization(
        batch_size, config.num_key_value_heads, config.head_dim, weight.dtype, weight.device
    )
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        generator = torch.Generator(device=weight.device).manual_seed(index)
        layer.keys.normal_(generator=generator)
        layer.values.normal_(generator=generator)
        if cache.offloading:
            cache.offload(index, cache.only_non_sliding)
    if cache.offloading:
        wait_for(weight.device)
        cache.prefetch(0, cache.only_non_sliding)  # each step ends with this one for the next
        wait_for(weight.device)
    return cache


def bench_baselines(
    bench: DecodeBench, model: nn.Module, shape: ModelShape, free: FreeMemory
) -> dict[str, Any]:
    """Measure transformers' caches beside scheduled decode, in turns.

    Args:
        bench: With `scheduled` among its programs, checked.
        model: The model that the programs were made from.
        shape: Its sizes.
        free: Memory that is free now.

    Returns:
        Plain data: times, whether logits agree, ratios, and what was left out and why.
    """
    setting = bench.setting
    needed = dense_kv_bytes(shape, setting.batch_size, setting.max_tokens)
    skipped = _skipped(needed, free)
    for name, reason in skipped.items():
        bench.say(f"batch {setting.batch_size}: {name} is left out: {reason}")
    if "static" in skipped:
        return {"overlap": OVERLAP, "skipped": skipped}
    static, checks = _static(bench, model)
    runs: dict[str, Callable[[int], list[float]]] = {"static": static.turn}
    if "offloaded" not in skipped:
        runs |= _offloaded(bench, model, static, checks)
    times: dict[str, list[float]] = {name: [] for name in ("scheduled", *runs)}
    bench.prepare(OVERLAP)
    for round_ in range(setting.rounds):
        bench.say(f"batch {setting.batch_size}: transformers, round {round_ + 1}")
        times["scheduled"] += bench.turn("scheduled")
        for name, turn in runs.items():
            times[name] += turn(setting.steps)
    del static, runs
    torch.compiler.reset()
    free_everything()
    return {"overlap": OVERLAP, **summary(times, checks), "skipped": skipped}


def summary(
    times: Mapping[str, Sequence[float]], checks: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return times, checks and ratios; a ratio to what computes something else is null.

    Args:
        times: Microseconds of each step, by program; `scheduled` is one of them.
        checks: What the comparison of logits found, by program.
    """
    found: dict[str, Any] = {
        name: {**Spread.of(values).to_dict(), **checks.get(name, {})}
        for name, values in times.items()
    }
    ours = found["scheduled"]["median"]
    if "static" in found:
        found["static_over_scheduled"] = round(found["static"]["median"] / ours, 3)
    if "offloaded" in found:
        right = next(
            (n for n in ("offloaded", "offloaded_repaired") if found.get(n, {}).get("agrees")), None
        )
        ratio = round(found[right]["median"] / ours, 3) if right else None
        found["offloaded_over_scheduled"] = ratio
        found["offloaded_compared"] = right
    return found


def _skipped(needed: int, free: FreeMemory) -> dict[str, str]:
    static = too_big("a static cache", needed, "device", free.device)
    # It is filled on the device, and torch keeps a second pinned copy while layers move.
    offloaded = too_big("a second static cache", 2 * needed, "device", free.device) or too_big(
        "an offloaded cache", 2 * needed, "CPU", free.host
    )
    reasons = {"static": static, "offloaded": offloaded}
    return {name: reason for name, reason in reasons.items() if reason}


def _static(bench: DecodeBench, model: nn.Module) -> tuple[StaticDecode, dict[str, dict[str, Any]]]:
    """Return compiled decode, and what its logits are compared with the eager ones."""
    setting = bench.setting
    bench.say(f"batch {setting.batch_size}: transformers' static cache, compiling")
    empty = StaticCache(config=_config(model), max_cache_len=setting.max_tokens)
    cache = fill_static(empty, model, setting.batch_size)
    eager = StaticDecode(model, cache, bench.ids, bench.start)
    reference = eager.logits()
    noise = _difference(eager.logits(), reference)
    compiled = StaticDecode(_compiled(model), cache, bench.ids, bench.start)
    difference = _difference(compiled.logits(), reference)
    return compiled, {"static": {"relative_difference": difference, "eager_noise": noise}}


def _offloaded(
    bench: DecodeBench,
    model: nn.Module,
    static: StaticDecode,
    checks: dict[str, dict[str, Any]],
) -> dict[str, Callable[[int], list[float]]]:
    """Return the turns of offloaded decode, repaired as little as its logits need."""
    setting = bench.setting
    eager = StaticDecode(model, static.cache, bench.ids, bench.start)
    reference = eager.logits()
    # Neither is a number if the logits are not.
    static_check = checks["static"]
    rounding = max(2 * (static_check["eager_noise"] or 0), static_check["relative_difference"] or 0)
    run: StaticDecode | None = None
    repair = _REPAIRS[0]
    differences: dict[str, float | None] = {}
    for repair in _REPAIRS:
        bench.say(f"batch {setting.batch_size}: transformers' offloaded cache, repair {repair}")
        del run  # its content may be damaged
        free_everything()
        empty = OffloadedCache(model, setting.max_tokens, repair)
        run = StaticDecode(
            model, fill_static(empty, model, setting.batch_size), bench.ids, bench.start
        )
        del empty
        difference = differences[repair] = _difference(run.logits(), reference)
        agrees = difference is not None and difference <= rounding
        name = "offloaded" if repair == "none" else "offloaded_repaired"
        checks[name] = {"agrees": agrees, "relative_difference": difference, "repair": repair}
        checks[name]["difference_by_repair"] = dict(differences)
        if agrees:
            break
    assert run is not None
    turns = {"offloaded": partial(_turn_with, run, "none")}
    if repair != "none":
        turns["offloaded_repaired"] = partial(_turn_with, run, repair)
    return dict(turns)


def _turn_with(run: StaticDecode, repair: str, steps: int) -> list[float]:
    """Time a turn; what a damaged cache holds does not change its time."""
    wait_for(run.input_ids.device)
    assert isinstance(run.cache, OffloadedCache)
    run.cache.repair = repair
    return run.turn(steps)


def _compiled(model: nn.Module) -> Callable[..., Any]:
    forward: Callable[..., Any] = torch.compile(
        model.forward, mode="reduce-overhead", fullgraph=True
    )
    return forward


def _difference(logits: Tensor, reference: Tensor) -> float | None:
    """Return the difference relative to the reference, None if it is not a number."""
    difference = float((logits - reference).norm() / reference.norm())
    return difference if math.isfinite(difference) else None


def _config(model: nn.Module) -> Any:
    return model.config
