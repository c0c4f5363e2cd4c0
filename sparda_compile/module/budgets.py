"""Budgets of mode `speculate` that follow the text: counted on the device, chosen now and then.

    every PERIOD steps   copy the layers' counters to the CPU; nothing waits for it
    PERIOD later         they are there: choose each layer's budget, and write those that change

A budget is read on the device, so a change needs no other program and no other capture. What a step
returns does not depend on it; with `repair="union"` it would, so there budgets stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.isa.counters import REPAIRED
from sparda_compile.program.budget import BudgetControl, budgets_of
from sparda_compile.state.layout import state_name

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from sparda_compile.program.plan import Plan
    from sparda_compile.runtime.kv_cache import KVCache

__all__ = ["PERIOD", "Budgets"]

PERIOD: Final = 64
"""Decode steps between two looks at the counters."""


class Budgets:
    """Chooses the budgets of one KV cache while it is decoded.

    Args:
        plan: Of the decode; its layers that speculate are looked after.
        kv: The cache.
        fixed: Layers whose budgets were set by hand; they keep them.

    Attributes:
        kv: The cache.
        controls: By layer.
    """

    def __init__(self, plan: Plan, kv: KVCache, fixed: Collection[int] = ()) -> None:
        config, num_blocks = kv.layout.config, kv.layout.num_blocks
        most = kv.layout.num_predicted
        scored = num_blocks if config.top_k is None else config.top_k
        choices = budgets_of(config.num_forced, scored, most)
        self.kv = kv
        self.controls = {
            layer: BudgetControl(times, choices, most)
            for layer, times in plan.speculated.items()
            if layer not in fixed and config.repair == "exact"
        }
        kv.set_budgets({layer: control.budget for layer, control in self.controls.items()})
        self._num_steps = 0
        self._counted: dict[int, int] = {}
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None
        groups = {shape.layer: shape.num_groups for shape in kv.layout.layers}
        self._pairs = {layer: groups[layer] * kv.layout.batch_size for layer in self.controls}

    def fix(self, layers: Collection[int]) -> None:
        """Leave layers alone from now on."""
        self.controls = {k: v for k, v in self.controls.items() if k not in layers}
        self._pending = None

    def step(self) -> None:
        """Note that a decode step was issued."""
        self._num_steps += 1
        if self._num_steps % PERIOD or not self.controls:
            return
        if self._pending is not None:
            counts, ready = self._pending
            if ready is not None and not ready.query():
                return  # looked at again in a period
            self._choose(counts.tolist())
        self._pending = self._read()

    def _read(self) -> tuple[Tensor, torch.cuda.Event | None]:
        names = [state_name("counters", layer) for layer in self.controls]
        counts = torch.stack([self.kv.state[name][REPAIRED] for name in names])
        if not counts.is_cuda:
            return counts, None
        kept = torch.empty_like(counts, device="cpu", pin_memory=True)
        kept.copy_(counts, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return kept, ready

    def _choose(self, counts: list[int]) -> None:
        changed = {}
        for (layer, control), count in zip(self.controls.items(), counts, strict=True):
            new = count - self._counted.get(layer, count)
            is_known = layer in self._counted and new >= 0  # else the counters began anew
            self._counted[layer] = count
            if not is_known:
                continue
            before = control.budget
            if control.observe(new / (PERIOD * self._pairs[layer])) != before:
                changed[layer] = control.budget
        if changed:
            self.kv.set_budgets(changed)
            self._counted.clear()  # what was counted until now was missed by other budgets
