"""Groups of a configuration that say which blocks are read, and how they are guessed early."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal, get_args

from sparda_compile.checks import flag, number, one_of, plain_numbers, whole
from sparda_compile.errors import ConfigError
from sparda_compile.registry import HINTS, PREDICTORS, SELECTORS

__all__ = ["Mode", "Prediction", "Prefill", "Repair", "Selection", "Where"]

Mode = Literal["dense", "query", "forecast", "exact", "speculate"]
Prefill = Literal["auto", "sparse", "dense"]
Repair = Literal["exact", "union"]
Where = Literal["auto", "always"]

_MODES: Final = get_args(Mode)
_DEFAULT_HINT: Final = "forecast"
# Predicted blocks over those that scores choose.
_MOST_BUDGET: Final = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Which blocks attention reads, and who says so.

    Attributes:
        mode: Who selects the KV blocks that attention reads. `dense`: nobody, all blocks.
            `query`: the layer's own query. `forecast`: the previous layer's Forecast (SparDA).
            `exact`: the layer's own query, with a hint that prefetches and a repair of what
            the hint missed; equals `query` bit for bit. `speculate`: the layer's own query, while
            attention to predicted blocks already runs, then the rest (PRR; see `Prediction`);
            equals `query` but for rounding, with KV on the device.
        selector: How a query scores blocks: `infllm2` (mean-pooled keys, softmax per head),
            `quest` (bounds from each block's smallest and largest key), `lowbit2` or `lowbit4`
            (attention mass by keys in 2 or 4 bits, token by token; on a GPU for decode steps
            alone) or `nosa` (`short_list` blocks as `infllm2`, or the Forecast, ranks them, the
            rest by retention scores). A
            model for `nosa` carries its retention score in the last channel of each key and 1 in
            that of each query (docs/models.md); `optimize` refuses others by their queries.
        hint: What `exact` prefetches by: `forecast`, `previous_step`, `previous_layer`,
            `next_query` (the layer's query projection on the input of the layer before), `ema`
            (the scores of past steps, smoothed; see `Prediction`) or `mixture` (both in one, by a
            share that each layer learns). Several, as a tuple: each
            prefetches at its own time, the later ones what the earlier have not brought. Mode
            `speculate` predicts by `ema`, whatever the default says.
        forecast_rank: Rank r of a Forecast's projection, which is then the product of two matrices
            [G*F*D, r] and [r, hidden]; one whose matrices are not smaller than the full
            [G*F*D, hidden] gives the full one. None leaves it to the file of weights, and without
            one to a rule: no more numbers than 256 rows of the hidden width for each head of a
            group, SparDA's own size.
        forecast_heads: F, heads of a Forecast for each KV head: it divides the query heads of one.
            1 is SparDA's. Of more each is scored as a query head is, by `selector` itself; as many
            as there are query heads start as the hint `next_query`. None leaves it to the file of
            weights, and is 1 without one.
        top_k: Blocks to pick beyond the sink and local ones; None picks every block. NOSA's
            published constants are top_k=78 with local_blocks=16.
        short_list: Of the top_k blocks, those that the query or the Forecast picks; read by
            selector `nosa` alone.
        sink_blocks: Always-kept first blocks.
        local_blocks: Always-kept most recent blocks, besides the one being written.
        prefill: What the tokens of a prompt read. `dense`: everything before them. `sparse`: each
            its own blocks, those that a decode step would select there. `auto`: planned for a GPU,
            of the two what is expected to be faster for a prompt of that length; for a CPU
            `dense`.
        prefill_selector: How a sparse prompt's tokens score blocks, where that is not `selector`:
            `infllm2` in the place of `lowbit2` or `lowbit4`, which multiply each token of a prompt
            with all low-bit keys before it. In mode `forecast` their Forecasts score what it
            keeps. The cache then keeps both summaries, in decode too, since a later turn's tokens
            select among all blocks. None is `selector` itself; not read where no prompt can be
            sparse.
        prefill_candidates: Times `top_k` blocks whose every key is scored for a token of a sparse
            prompt, 1.0 or more, for `lowbit2` and `lowbit4`: a look at all blocks by one query for
            each KV head, the mean of its group, proposes them (docs/gpu.md). A token that has no
            more blocks scores all. None scores all blocks for every token. Refused where one head
            scores as that look does, as a Forecast of one head; not read where no prompt can be
            sparse.
        shared_tokens: Neighbouring tokens of a sparse prompt that read the same blocks, those of
            the first of them; it divides `block_size`. 1, the default, gives each token its own, as
            a decode step would. Of more, one scores blocks for all, and what is selected depends on
            where a prompt is cut, unless it is cut at multiples of it.
    """

    mode: Mode = "forecast"
    selector: str = "infllm2"
    hint: str | tuple[str, ...] = _DEFAULT_HINT
    forecast_rank: int | None = None
    forecast_heads: int | None = None
    top_k: int | None = 62
    short_list: int = 23
    sink_blocks: int = 1
    local_blocks: int = 32
    prefill: Prefill = "auto"
    prefill_selector: str | None = None
    prefill_candidates: float | None = None
    shared_tokens: int = 1

    def __post_init__(self) -> None:
        plain_numbers(self)
        one_of("mode", self.mode, _MODES)
        one_of("selector", self.selector, SELECTORS.choices())
        object.__setattr__(self, "hint", _hint_of(self.hint))
        if self.mode == "speculate" and self.hint not in (_DEFAULT_HINT, *PREDICTORS.choices()):
            raise ConfigError(
                f"hint={self.hint!r} cannot be used by mode='speculate', which predicts by scores "
                f"of past steps; use hint={PREDICTORS.choices()[0]!r}, or mode='exact' with it."
            )
        one_of("prefill", self.prefill, get_args(Prefill))
        self._check_prefill_selector()
        for name in ("sink_blocks", "local_blocks", "short_list"):
            whole(name, getattr(self, name), 0)
        whole("shared_tokens", self.shared_tokens, 1)
        if self.top_k is not None:
            whole("top_k", self.top_k, 0)
        if self.forecast_rank is not None:
            whole("forecast_rank", self.forecast_rank, 1)
        if self.forecast_heads is not None:
            whole("forecast_heads", self.forecast_heads, 1)
        self._check_prefill_candidates()
        if self.mode == "dense" and self.prefill == "sparse":
            wrong = "prefill='sparse' selects by the mode, and mode='dense' selects nothing"
            raise ConfigError(f"{wrong}; use prefill='auto', or mode='query' or 'forecast'.")
        if self.top_k is None or self.short_list <= self.top_k:
            return
        if SELECTORS[self.selector].has_short_list:
            raise ConfigError(
                f"short_list={self.short_list} is more than the top_k={self.top_k} blocks that "
                f"selector={self.selector!r} may pick; use short_list of 0 to {self.top_k}, or "
                "raise top_k (published: short_list=23, top_k=78)."
            )

    def _check_prefill_selector(self) -> None:
        name = self.prefill_selector
        if name is None:
            return
        one_of("prefill_selector", name, SELECTORS.choices())
        if SELECTORS[name].has_short_list and name != self.selector:
            raise ConfigError(
                f"prefill_selector={name!r} has a short list, and selector={self.selector!r} has "
                f"none; use prefill_selector='infllm2', or selector={name!r} for both."
            )

    def _check_prefill_candidates(self) -> None:
        value, name = self.prefill_candidates, self.prefill_selector or self.selector
        if value is None:
            return
        number("prefill_candidates", value)
        if value < 1.0:
            raise ConfigError(
                f"prefill_candidates={value} is no multiple of top_k that holds top_k blocks; use "
                "1.0 or more, such as 2.0, or None, which scores all blocks."
            )
        if self.mode == "dense":
            return
        if not SELECTORS[name].narrows:
            raise ConfigError(
                f"prefill_candidates={value} are blocks whose every low-bit key is scored, and "
                f"selector={name!r} of prompts scores no such keys; use prefill_selector='lowbit2' "
                "or 'lowbit4', or prefill_candidates=None."
            )
        if self.mode == "forecast" and (self.forecast_heads or 1) == 1:
            raise ConfigError(
                f"prefill_candidates={value} are proposed by one query for each KV head, and a "
                "Forecast of one head is one: it scores all blocks in that time. Use "
                "prefill_candidates=None, or a Forecast of several heads, forecast_heads=4."
            )


def _hint_of(value: object) -> str | tuple[str, ...]:
    """Return a name, or several different ones as a tuple."""
    if not isinstance(value, (tuple, list)):
        one_of("hint", value, HINTS.choices())
        return str(value)
    names = tuple(value)
    for name in names:
        one_of("hint", name, HINTS.choices())
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"hint={value!r} names {'a hint twice' if names else 'no hint'}; use one name, or "
            f"several different ones such as ('ema', 'forecast'), of {', '.join(HINTS.choices())}."
        )
    for name in names if len(names) > 1 else ():
        twice = [other for other in names if other in HINTS[name].includes]
        if twice:
            raise ConfigError(
                f"hint={value!r} names {', '.join(map(repr, twice))}, which hint {name!r} has in "
                "it; use one of the two."
            )
    return tuple(map(str, names)) if len(names) > 1 else str(names[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """How hint `ema` and mode `speculate` predict a step from the steps before, and to what end.

    The last one is of every hint: whether attention begins with what it has brought.

    Attributes:
        ema_level: Weight of the newest score in a block's level, above 0 and at most 1; 1 predicts
            the blocks with the best scores of the last step. PRR's alpha.
        ema_trend: Weight of the newest score's distance from the level in a block's trend, above 0
            and at most 1. PRR's beta.
        ema_damping: How much of its trend is added to a block's level, 0 to 1; at 0, the default,
            the trend counts for nothing. PRR's gamma.
        ema_calibrate: Whether the end of each prompt decides, layer by layer, by which of 80
            choices of these three its steps are predicted, as PRR does; those given count where a
            prompt is shorter than 16 tokens. On a real model it predicted no better.
        speculation_budget: Blocks that `speculate` predicts beside sink, local and current ones, as
            a multiple of `top_k`, 0.0 to 4.0. It is the most; see `SpardaCache.set_budgets`. PRR's
            delta.
        repair: What `speculate` returns. `exact`: attention over the selected blocks. `union`: over
            these and the predicted ones, as the paper does, which is approximate: what it returns
            depends on what was predicted.
        speculate_where: In which layers. `auto`: where the planning machine's constants say that it
            is faster. `always`: in all that select.
        attend_before_repair: In which layers mode `exact` attends to the blocks that are there
            while those that its hints have missed are copied. `auto`: where the planning machine's
            constants say that it is faster than one attention behind the copy. `always`: in all
            that select. The bits of the result are the same.
    """

    ema_level: float = 0.4
    ema_trend: float = 0.3
    ema_damping: float = 0.0
    ema_calibrate: bool = False
    speculation_budget: float = 1.5
    repair: Repair = "exact"
    speculate_where: Where = "auto"
    attend_before_repair: Where = "auto"

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name in ("ema_level", "ema_trend"):
            number(name, getattr(self, name))
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is no weight of the newest score; use a number "
                    "above 0.0 and at most 1.0."
                )
        flag("ema_calibrate", self.ema_calibrate)
        number("ema_damping", self.ema_damping)
        if not 0.0 <= self.ema_damping <= 1.0:
            raise ConfigError(
                f"ema_damping={self.ema_damping} is no share of the trend; use 0.0 to 1.0."
            )
        number("speculation_budget", self.speculation_budget)
        if not 0.0 <= self.speculation_budget <= _MOST_BUDGET:
            raise ConfigError(
                f"speculation_budget={self.speculation_budget} is no multiple of top_k that can "
                f"be predicted; use 0.0 to {_MOST_BUDGET}."
            )
        one_of("repair", self.repair, get_args(Repair))
        one_of("speculate_where", self.speculate_where, get_args(Where))
        one_of("attend_before_repair", self.attend_before_repair, get_args(Where))
