"""What a mode means, worked out once from a configuration.

| mode | blocks are selected by | the copy of a layer's blocks | hints |
|---|---|---|---|
| `dense` | nobody: all are read | none | none |
| `query` | the layer's query | in line | none |
| `forecast` | the Forecast | starts early, awaited late | none |
| `exact` | the layer's query | of the hints' early; the rest beside attention, then repair | some |
| `speculate` | the layer's query | none: all are on the device | none, but a prediction |
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, ClassVar, Protocol

from sparda_compile.registry import HINTS, PREDICTORS, SELECTORS, forecast_rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparda_compile.config import SpardaConfig
    from sparda_compile.selectors.base import Selector
    from sparda_compile.state.layout import CacheLayout, LayerShape, TensorSpec

__all__ = ["HintMethod", "Strategy", "strategy_of"]


class HintMethod(Protocol):
    """What a hint says of itself; `hints.base.Hint` also writes its nodes.

    Attributes:
        name: As in `SpardaConfig.hint`.
        needs_forecast: Whether it takes Forecast weights.
        ops: Ops that it adds to its layer, besides the plan, the copy and the wait of what it
            guesses.
        prompt_ops: Ops that it adds to its layer in a sparse prefill.
        dense_prompt_ops: Ops that it adds to its layer in a dense one.
        includes: Hints that are part of it, and cannot stand beside it.
        borrows_ids: Whether its ids are what another layer has selected, and not ops of its own.
        recall: Share that it is expected to name of the blocks that its layer selects and the step
            before did not; about what hints by scores have, where nobody has measured it.
        fetched: Blocks that are new in a step among those that it names, right or wrong, over
            those that are new among its layer's.
    """

    name: ClassVar[str]
    needs_forecast: ClassVar[bool] = False
    ops: ClassVar[tuple[str, ...]] = ()
    prompt_ops: ClassVar[tuple[str, ...]] = ()
    dense_prompt_ops: ClassVar[tuple[str, ...]] = ()
    includes: ClassVar[tuple[str, ...]] = ()
    borrows_ids: ClassVar[bool] = False
    recall: ClassVar[float] = 0.75
    fetched: ClassVar[float] = 1.0

    def state(self, layout: CacheLayout, layer: LayerShape) -> dict[str, TensorSpec]:
        """Return the state tensors that it keeps for a layer, by short name."""
        del layout, layer
        return {}

    def source(self, target: LayerShape, layers: Sequence[LayerShape]) -> LayerShape | None:
        """Return the layer that a layer's guess is made in; None if it has no guess.

        The first layer has none before it, so its guess is made in its own.

        Args:
            target: The layer.
            layers: All layers, in order.
        """
        before = [layer for layer in layers if layer.layer < target.layer]
        return before[-1] if before else target


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What a mode means.

    Attributes:
        selector: Scores blocks against the layer's query; None where every block is read.
        forecast_selector: Scores them against a Forecast; None where there is none.
        selects_by_forecast: Whether the Forecast selects what attention reads.
        hints: Guess a layer's blocks early, each at its own time.
        overlaps: Whether copies start before they are awaited.
        repairs: Whether attention begins with what is there, and the rest is merged in later.
        predictor: Predicts the blocks of the next step, for attention to begin with; None where
            attention begins when the selection has ended.
        prompt_selector: Scores for the tokens of a prompt, where that is not `selector`.
        forecast_heads: Heads of a Forecast for each KV head.
    """

    selector: Selector | None
    forecast_selector: Selector | None
    selects_by_forecast: bool
    hints: tuple[HintMethod, ...]
    overlaps: bool
    repairs: bool
    predictor: HintMethod | None = None
    prompt_selector: Selector | None = None
    forecast_heads: int = 1

    @property
    def keepers(self) -> tuple[HintMethod, ...]:
        """What keeps state of its own from step to step."""
        return self.hints if self.predictor is None else (*self.hints, self.predictor)

    @property
    def selects(self) -> bool:
        """Whether attention reads selected blocks, and not all."""
        return self.selector is not None

    @property
    def needs_forecast(self) -> bool:
        """Whether programs take Forecast weights."""
        return self.forecast_selector is not None

    @property
    def in_prompts(self) -> Strategy:
        """What scores for the tokens of a prompt, in the place of what does for a step."""
        if self.prompt_selector is None:
            return self
        name = self.prompt_selector.name
        own = forecast_rule(name, self.forecast_heads) if self.needs_forecast else None
        return dataclasses.replace(
            self,
            selector=self.prompt_selector,
            forecast_selector=None if own is None else SELECTORS[own],
            prompt_selector=None,
        )

    @property
    def chooser(self) -> Selector | None:
        """What scores the blocks that attention reads."""
        return self.forecast_selector if self.selects_by_forecast else self.selector

    @property
    def selects_prompts(self) -> bool:
        """Whether what selects does so for the tokens of a prompt on a GPU, too."""
        rule = self.in_prompts.chooser
        return rule is not None and rule.selects_prompts

    @property
    def first_selector(self) -> str:
        """Name of what scores a query until a Forecast takes its place, by the same summary."""
        assert self.selector is not None
        if not self.selects_by_forecast or self.selector.summary.name == self._forecast_summary:
            return self.selector.name
        same: str = next(s.name for s in SELECTORS if s.summary.name == self._forecast_summary)
        return same

    @property
    def _forecast_summary(self) -> str:
        assert self.forecast_selector is not None
        return self.forecast_selector.summary.name

    @property
    def scorers(self) -> tuple[Selector, ...]:
        """All selectors whose summaries a cache keeps."""
        by_query = None if self.selects_by_forecast else self.selector
        in_prompts = None if self.prompt_selector is None else self.in_prompts.chooser
        return tuple(s for s in (by_query, self.forecast_selector, in_prompts) if s is not None)


@functools.lru_cache(maxsize=256)
def strategy_of(config: SpardaConfig) -> Strategy:
    """Return what a configuration's mode means."""
    if config.mode == "dense":
        return Strategy(
            None, None, selects_by_forecast=False, hints=(), overlaps=False, repairs=False
        )
    selector = SELECTORS[config.selector]
    hints = tuple(HINTS[name] for name in config.hints)
    by_forecast = config.mode == "forecast"
    has_forecast = by_forecast or any(hint.needs_forecast for hint in hints)
    return Strategy(
        selector=selector,
        forecast_selector=SELECTORS[config.forecast_selector] if has_forecast else None,
        selects_by_forecast=by_forecast,
        hints=hints,
        overlaps=config.mode in ("forecast", "exact"),
        repairs=config.mode == "exact",
        predictor=None if config.predictor is None else PREDICTORS[config.predictor],
        prompt_selector=_prompt_selector(config),
        forecast_heads=config.heads_of_forecast,
    )


def _prompt_selector(config: SpardaConfig) -> Selector | None:
    """Return who scores for the tokens of a prompt, if some prompt may be sparse."""
    name = config.prefill_selector
    if name in (None, config.selector) or config.prefill == "dense" or config.top_k is None:
        return None
    found: Selector = SELECTORS[name]
    return found
