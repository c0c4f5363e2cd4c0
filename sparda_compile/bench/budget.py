"""The same device memory for KV, spent in two ways: what throughput does it buy?

    resident    every block on the device: few sequences, no copies
    scheduled   blocks in CPU memory, selected ones on the device: many sequences, copies

A budget counts all device bytes of the KV cache, summaries and tables included; the trace, which
only benchmarks have, is left out. Each side runs at the largest batch that keeps within it, and the
result says what forbade one more sequence.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

from sparda_compile.bench.decode import DecodeBench, DecodeSetting
from sparda_compile.bench.memory import (
    GIB,
    FreeMemory,
    LargestBatch,
    free_everything,
    largest_batch,
    layout_of,
)
from sparda_compile.bench.timing import Spread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sparda_compile.bench.shapes import ModelShape
    from sparda_compile.program.captures import Captures
    from sparda_compile.state.layout import CacheLayout

__all__ = ["bench_budget", "budget_row", "plan_budget"]

_SIDES = ("resident", "scheduled")


def plan_budget(
    shape: ModelShape, setting: DecodeSetting, budget: int, free: FreeMemory
) -> dict[str, LargestBatch]:
    """Return both sides' largest batch; they are on the device at the same time.

    Args:
        shape: The model's sizes.
        setting: What to measure; batch size and variants do not matter.
        budget: Bytes of device memory for one side's KV cache.
        free: What the machine has.
    """

    def layout_for(side: str, batch_size: int) -> CacheLayout:
        return layout_of(shape, side, batch_size, setting.max_tokens, **setting.settings)

    plan = {}
    for side in _SIDES:
        plan[side] = largest_batch(partial(layout_for, side), budget, free)
        free = FreeMemory(free.device - plan[side].device_bytes, free.host - plan[side].host_bytes)
    return plan


def bench_budget(
    captures: Captures,
    plan: Mapping[str, LargestBatch],
    budget: int,
    setting: DecodeSetting,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure both sides of one budget.

    Args:
        captures: A model on a CUDA device.
        plan: Of `plan_budget`.
        budget: Bytes of device memory for one side's KV cache.
        setting: What to measure; batch size and variants are the plan's.
        say: Told what is going on.

    Returns:
        Plain data, by overlap; without times, and with a reason, if a side has no batch at all.
    """
    if not all(plan[side].batch_size for side in _SIDES):
        return budget_row(plan, budget, {})
    benches = {
        side: DecodeBench(
            captures,
            dataclasses.replace(setting, batch_size=plan[side].batch_size, variants=(side,)),
            say,
        )
        for side in _SIDES
    }
    for bench in benches.values():
        bench.check()
    times: dict[str, dict[str, list[float]]] = {}
    for overlap in setting.overlaps:
        say(f"budget {budget / GIB:g} GiB: overlap {overlap}")
        for bench in benches.values():
            bench.prepare(overlap)
        row: dict[str, list[float]] = {side: [] for side in _SIDES}
        for _ in range(setting.rounds):
            for side, bench in benches.items():
                row[side] += bench.turn(side)
        times[str(overlap)] = row
    benches.clear()
    del bench
    free_everything()
    return budget_row(plan, budget, times)


def budget_row(
    plan: Mapping[str, LargestBatch],
    budget: int,
    times: Mapping[str, Mapping[str, list[float]]],
) -> dict[str, Any]:
    """Return plain data of one budget.

    Args:
        plan: Of `plan_budget`.
        budget: Bytes of device memory for one side's KV cache.
        times: Microseconds of each step, by overlap and side.
    """
    result: dict[str, Any] = {"budget_gib": round(budget / GIB, 3)}
    for side in _SIDES:
        result[side] = {
            "batch_size": plan[side].batch_size,
            "limited_by": plan[side].limited_by,
            "device_gib": round(plan[side].device_bytes / GIB, 3),
            "host_gib": round(plan[side].host_bytes / GIB, 3),
        }
        if not plan[side].batch_size:
            result["skipped"] = f"not one sequence of {side} fits: {plan[side].limited_by}"
    result["by_overlap"] = {
        overlap: _rates({side: plan[side].batch_size for side in _SIDES}, sides)
        for overlap, sides in times.items()
    }
    return result


def _rates(batches: Mapping[str, int], times: Mapping[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    rates = {}
    for side, values in times.items():
        spread = Spread.of(values)
        rates[side] = batches[side] / spread.median * 1e6
        row[side] = {**spread.to_dict(), "tokens_per_s": round(rates[side], 1)}
    row["throughput_ratio"] = round(rates["scheduled"] / rates["resident"], 3)
    return row
