"""Decode of one token at a long context: the programs of `programs.py`, interleaved in one run.

For each batch size every program is built once and checked: scheduled, inline and resident decode
must agree bit for bit on the same blocks. Then, for each overlap, they take turns; every turn's
steps are timed one by one. The floor is max(step with every page resident, bytes / memcpy rate).
"""

from __future__ import annotations

import dataclasses
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.bench.memory import HOMES
from sparda_compile.bench.programs import (
    KNOBS,
    build_body,
    build_program,
    predicted_us,
    variant_config,
)
from sparda_compile.bench.recorded import RecordedSteps, follow_recorded
from sparda_compile.bench.synthetic import fill, follow, rewind, trace_steps_of
from sparda_compile.bench.timing import Spread, time_calls, wait_for
from sparda_compile.config import MIB, SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.runtime.pinned import PinnedMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sparda_compile.program.captures import Captures
    from sparda_compile.program.program import Program

__all__ = ["VARIANTS", "DecodeBench", "DecodeSetting", "build_variant", "memcpy_gbps"]

VARIANTS: Final = (*KNOBS, "body")
_TRACE_STEPS: Final = 96
_CHECKED: Final = 3
_WARM: Final = 4


@dataclasses.dataclass(frozen=True)
class DecodeSetting:
    """What to measure.

    Attributes:
        batch_size: Sequences.
        max_tokens: Tokens per sequence that the cache holds; it is filled up to the last ones.
        overlaps: Shares of scored blocks that a step has in common with the one before.
        variants: Programs, keys of `programs.KNOBS`, and `body`.
        rounds: Turns of each program at each overlap.
        steps: Steps of one turn.
        settings: Fields of SpardaConfig.
        recorded: Steps of a real model to follow, in the place of overlaps or beside them.
    """

    batch_size: int
    max_tokens: int = 131072
    overlaps: tuple[float, ...] = (0.5, 0.7, 0.9, 0.97)
    variants: tuple[str, ...] = VARIANTS
    rounds: int = 3
    steps: int = 20
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    recorded: tuple[RecordedSteps, ...] = ()

    def __post_init__(self) -> None:
        """Check what a run would only find out after minutes."""
        unknown = [variant for variant in self.variants if variant not in VARIANTS]
        if unknown or len(set(self.variants)) < len(self.variants):
            raise ConfigError(
                f"variants {', '.join(self.variants)} are not known or named twice; use some of "
                f"{', '.join(VARIANTS)}, each once."
            )
        if not all(0.0 <= overlap <= 1.0 for overlap in self.overlaps):
            raise ConfigError(f"overlaps {self.overlaps} are no shares; use 0.0 to 1.0.")
        if not 1 <= self.steps <= _TRACE_STEPS - _WARM:
            raise ConfigError(
                f"steps={self.steps} do not fit the trace; use 1 to {_TRACE_STEPS - _WARM}."
            )
        for name in ("batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is too small; use 1 or more.")
        for variant in KNOBS.keys() & set(self.variants):
            variant_config(variant, self.max_tokens, 0, **self.settings)
        for recorded in self.recorded:
            config = SpardaConfig(**self.settings)
            recorded.check(config, self.num_tokens, _WARM + self.steps)

    @property
    def num_tokens(self) -> int:
        """Tokens per sequence at the first step; the steps need the room that is left."""
        return self.max_tokens - 128

    @property
    def trace_steps(self) -> int:
        """Steps of the trace."""
        return _TRACE_STEPS


def memcpy_gbps(*, to_host: bool = False) -> float:
    """Return the rate of one copy of 64 MiB from or to pinned memory, 10^9 bytes per second."""
    region = PinnedMemory(64 * MIB)
    room = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    target, source = (region.tensor, room) if to_host else (room, region.tensor)
    us = time_calls(lambda: target.copy_(source, non_blocking=True), 20)
    region.close()
    return 64 * MIB / Spread.of(us).median / 1e3


def build_variant(captures: Captures, variant: str, setting: DecodeSetting) -> Program:
    """Return the program of a variant, one of `VARIANTS`, as a setting has it."""
    if variant == "body":
        lowering = setting.settings.get("lowering", "inductor")
        return build_body(captures, setting.batch_size, lowering)
    return build_program(
        captures,
        variant,
        setting.batch_size,
        setting.max_tokens,
        setting.trace_steps,
        **setting.settings,
    )


class DecodeBench:
    """The programs of one batch size with their caches.

    Args:
        captures: A model on a CUDA device.
        setting: What to measure.
        say: Told what is going on.
    """

    def __init__(
        self, captures: Captures, setting: DecodeSetting, say: Callable[[str], None]
    ) -> None:
        self.setting = setting
        self.say = say
        self._captures = captures
        self.device = next(captures.model.parameters()).device
        self.start = setting.num_tokens
        self.programs: dict[str, Program] = {}
        self.caches: dict[str, KVCache] = {}
        self.memory: dict[str, int] = {}
        self.build_s: dict[str, float] = {}
        for variant in setting.variants:
            say(f"batch {setting.batch_size}: building {variant}")
            begin = time.perf_counter()
            self._build(captures, variant)
            self.build_s[variant] = round(time.perf_counter() - begin, 1)
        config: Any = captures.model.config
        shape = (setting.batch_size, 1)
        self.ids = torch.randint(0, config.vocab_size, shape, device=self.device)
        self.positions = torch.full(shape, self.start, device=self.device)

    def _build(self, captures: Captures, variant: str) -> None:
        program = self.programs[variant] = build_variant(captures, variant, self.setting)
        home = HOMES.get(variant, variant)
        if home not in self.caches:
            before = torch.cuda.memory_allocated()
            self.caches[home] = KVCache(program.plan.layout, self.device)
            self.memory[home] = torch.cuda.memory_allocated() - before
            if variant != "body":
                fill(self.caches[home], self.start)
        self.caches[variant] = self.caches[home]

    def run(self, variant: str) -> torch.Tensor:
        """Take one step."""
        return self.programs[variant](self.ids, self.positions, None, self.caches[variant])

    def prepare(self, followed: float | RecordedSteps) -> list[float]:
        """Give every cache a trace, and start again.

        Args:
            followed: An overlap, or recorded steps.

        Returns:
            The overlap of each layer, of recorded steps as far as they are run and timed.
        """
        overlaps: list[float] = []
        for variant, cache in self.caches.items():
            if variant in ("scheduled", "resident"):
                if trace_steps_of(cache.layout) and isinstance(followed, RecordedSteps):
                    needed = _WARM + self.setting.steps
                    overlaps = follow_recorded(cache, self.start, followed, needed)
                elif trace_steps_of(cache.layout):
                    assert isinstance(followed, float)
                    follow(cache, self.start, followed)
                    overlaps = [followed] * len(cache.layout.layers)
                rewind(cache, self.start)
        return overlaps

    def turn(self, variant: str) -> list[float]:
        """Return the times of one turn's steps, microseconds; it begins at the first step."""
        if variant != "body":
            rewind(self.caches[variant], self.start)
        for _ in range(_WARM):  # pages fill up: the first step misses every block
            self.run(variant)
        if variant != "body":
            self.caches[variant].reset_stats()
        return time_calls(partial(self.run, variant), self.setting.steps)

    def moved_bytes(self, variant: str) -> float:
        """Return the bytes that a step of the last turn copied to the device."""
        if variant == "body":
            return 0.0
        layers = self.caches[variant].stats().layers.values()
        return sum(layer.h2d_bytes for layer in layers) / self.setting.steps

    def check(self) -> None:
        """Compare what must be equal; this also compiles and captures everything."""
        self.prepare(0.9)
        logits = {}
        for variant in self.programs:
            self.say(f"batch {self.setting.batch_size}: compiling and checking {variant}")
            begin = time.perf_counter()
            if variant != "body":
                rewind(self.caches[variant], self.start)
            logits[variant] = torch.stack([self.run(variant) for _ in range(_CHECKED)])
            wait_for(self.device)
            self.build_s[variant] = round(self.build_s[variant] + time.perf_counter() - begin, 1)
        for variant in ("inline", "resident") if "scheduled" in logits else ():
            if variant in logits and not torch.equal(logits[variant], logits["scheduled"]):
                raise AssertionError(f"{variant} and scheduled decode give other logits")

    def measure(self) -> Iterator[dict[str, Any]]:
        """Time everything, in turns; yields what is found after each overlap, earlier ones too."""
        rate = self._rate()
        found = {**self._sizes(), "memcpy_gbps": round(rate, 2), "build_s": self.build_s}
        by_overlap = {}
        for overlap in self.setting.overlaps:
            self.say(f"batch {self.setting.batch_size}: overlap {overlap}")
            self.prepare(overlap)
            by_overlap[str(overlap)] = self._row(self._times(), rate, overlap)
            yield {**found, "by_overlap": dict(by_overlap)}
        for recorded in self.setting.recorded:
            self.say(f"batch {self.setting.batch_size}: {recorded.case}, as recorded")
            layers = self.prepare(recorded)
            overlap = round(sum(layers) / len(layers), 4)
            times = self._times()
            by_bytes = self._overlap_by_bytes(times["scheduled"][1])
            row = self._row(times, rate, by_bytes)
            by_layer = [round(layer, 3) for layer in layers]
            row["recorded"] = {**recorded.plain(), "overlap_by_layer": by_layer}
            row["recorded"]["overlap_by_bytes"] = round(by_bytes, 4)
            by_overlap[str(overlap)] = row
            yield {**found, "by_overlap": dict(by_overlap)}

    def _rate(self) -> float:
        """Return the rate of copies from CPU memory, 10^9 bytes per second."""
        return memcpy_gbps()

    def _sizes(self) -> dict[str, Any]:
        batch = self.setting.batch_size
        layout = self.caches["scheduled"].layout
        trace = self._trace_bytes(layout)

        def mib(num_bytes: int) -> float:
            return round(num_bytes / MIB / batch, 1)

        return {
            "device_mib_per_sequence": {name: mib(size) for name, size in self.memory.items()},
            "planned_device_mib_per_sequence": mib(layout.num_bytes(on_host=False) - trace),
            "trace_mib_per_sequence": mib(trace),
        }

    @staticmethod
    def _trace_bytes(layout: Any) -> int:
        specs = layout.all_tensors().items()
        return sum(spec.num_bytes for name, spec in specs if name.startswith("sparda_trace"))

    def _times(self) -> dict[str, tuple[list[float], float]]:
        """Return step times and bytes moved per step, by variant."""
        times: dict[str, list[float]] = {variant: [] for variant in self.programs}
        moved = dict.fromkeys(self.programs, 0.0)
        for round_ in range(self.setting.rounds):
            for variant in self.programs:
                times[variant] += self.turn(variant)
                if round_ == self.setting.rounds - 1:
                    moved[variant] = self.moved_bytes(variant)
        return {variant: (times[variant], moved[variant]) for variant in self.programs}

    def _overlap_by_bytes(self, num_bytes: float) -> float:
        """Return the overlap of steps at random for which a step would copy so many bytes.

        Real steps come back to blocks of earlier ones, which may still have a page.
        """
        layout = self.caches["scheduled"].layout
        scored = layout.num_selected - layout.config.num_forced
        each = sum(
            shape.num_groups * layout.stored_bytes(shape.layer, shape.head_dim, shape.dtype)
            for shape in layout.layers
        )
        every = self.setting.batch_size * scored * each
        return layout.overlap_at(num_bytes / every if every else 0.0)

    def _row(
        self, times: dict[str, tuple[list[float], float]], rate: float, overlap: float
    ) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for variant, (values, num_bytes) in times.items():
            predicted = predicted_us(self._captures, self.programs[variant].plan, overlap)
            row[variant] = {
                **Spread.of(values).to_dict(),
                "h2d_bytes": round(num_bytes),
                "predicted_us": round(predicted, 1),
            }
        us = {variant: spread["median"] for variant, spread in row.items()}
        link_us = row["scheduled"]["h2d_bytes"] / rate / 1e3
        row["link_us"] = round(link_us, 1)
        row["tokens_per_s"] = round(self.setting.batch_size / us["scheduled"] * 1e6, 1)
        if "inline" in us:
            row["inline_over_scheduled"] = round(us["inline"] / us["scheduled"], 3)
        if "body" in us:
            row["scheduled_over_body"] = round(us["scheduled"] / us["body"], 3)
        if "resident" in us:
            floor = max(us["resident"], link_us)
            row["floor_us"] = round(floor, 1)
            row["scheduled_over_floor"] = round(us["scheduled"] / floor, 3)
        if us.get("inline", 0.0) > us.get("resident", math.inf):
            exposed, synchronous = (us[name] - us["resident"] for name in ("scheduled", "inline"))
            row["exposed_over_inline"] = round(exposed / synchronous, 3)
        return row
