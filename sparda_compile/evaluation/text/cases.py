"""What is measured beside the dense model: configurations at budgets, and the oracle."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from sparda_compile.evaluation.run import budget_config
from sparda_compile.evaluation.text.oracle import ORACLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparda_compile.config import SpardaConfig

__all__ = ["DENSE", "Budget", "Case", "make_cases"]

DENSE: Final = "dense"


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many blocks a step reads: a share of all, or those chosen by score."""

    share: float | None = None
    top_k: int | None = None

    def config(self, base: SpardaConfig, length: int) -> SpardaConfig:
        """Return a configuration with this budget.

        Raises:
            ConfigError: If a share does not hold the blocks that are always read.
        """
        if self.share is not None:
            return budget_config(base, length, self.share)
        return base.replace(top_k=self.top_k)

    def __str__(self) -> str:
        """Return `10%` or `top 6`."""
        return f"top {self.top_k}" if self.share is None else f"{100 * self.share:g}%"


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration by its name.

    Attributes:
        name: Mode, selector, hint, budget, format of full blocks and what the prompt reads, where
            they matter.
        config: With its budget; its `prefill` is `dense` or `sparse`.
    """

    name: str
    config: SpardaConfig


def make_cases(
    bases: Sequence[SpardaConfig],
    length: int,
    budgets: Sequence[Budget],
    prefills: Sequence[str],
    *,
    oracle: bool,
) -> list[Case]:
    """Return each configuration at each budget and kind of prompt, once.

    Args:
        bases: Without a budget, one for each mode, selector, hint and format of full blocks.
        length: Tokens of a sequence.
        budgets: Of the blocks; mode `dense` has none.
        prefills: What a prompt's tokens read: `dense`, `sparse`.
        oracle: Whether the oracle stands beside them at each budget, behind a dense prompt.

    Raises:
        ConfigError: If a budget does not hold the blocks that are always read.
    """
    found: dict[str, Case] = {}
    for budget in budgets:
        if oracle and bases:
            base = bases[0].replace(
                mode="query",
                selector=ORACLE,
                prefill="dense",
                prefill_candidates=None,
                kv_format="model",
            )
            found[f"{ORACLE} {budget}"] = Case(f"{ORACLE} {budget}", budget.config(base, length))
        for base in bases:
            for prefill in prefills if base.mode != "dense" else ("dense",):
                name = _name(base, budget, prefill)
                config = base if base.mode == "dense" else budget.config(base, length)
                found.setdefault(name, Case(name, config.replace(prefill=prefill)))
    return list(found.values())


def _name(config: SpardaConfig, budget: Budget, prefill: str) -> str:
    tail = "" if config.kv_format == "model" else f", {config.kv_format}"
    if config.mode == "dense":
        return f"module, dense{tail}"
    hint = f" by {'+'.join(config.hints)}" if config.hints else ""
    ending = ", sparse prompt" if prefill == "sparse" else ""
    if ending and config.prefill_selector:
        ending += f" by {config.prefill_selector}"
    if ending and config.prefill_candidates:
        ending += f" of {config.prefill_candidates:g}x candidates"
    return f"{config.mode} {config.selector}{hint} {budget}{tail}{ending}"
