"""How much of what a step reads was guessed before it, at budgets above its own.

Every guess names the blocks that are always read (sink, local, current), and by a budget of 1 as
many others as a step chooses by score. What is counted leaves the former out:

    coverage   blocks that are guessed and read / blocks that are read
    precision  blocks that are guessed and read / blocks that are guessed
    fetched    blocks that are guessed and that the step before did not read / blocks that are read

| who guesses | by |
|---|---|
| `ema` | level and trend of the scores of the steps before, as hint `ema` |
| `last_scores` | the scores of the step before: `ema` with a level weight of 1 |
| `previous_step` | what the newest steps read, newest first: what a pool of that many pages holds |
| `past_steps` | in how many of the last 8 steps a block was read; the newest first where equal |
| `previous_layer` | the scores of the layer before in this step |
| `next_query`, `forecast` | their own scores |
| `mixture` | both of these two in one, by a share that is learned, as hint `mixture` |
| `mixed` | 0.75 of the scores of `next_query` and 0.25 of `ema`'s, where both are asked for |
| `mixed_by_layer` | the same, by the share that found most of the layer's blocks before |

Scores that cannot be compared are standardised before they are mixed. Levels begin with the first
step that is watched. As many steps as begin them behind a prompt count for nobody, and decide by
which weights `ema` guesses, if that is calibrated.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.kernels.begin_prediction import WINDOW
from sparda_compile.kernels.calibrate import CALIBRATION_WINDOW, calibrate
from sparda_compile.kernels.mixture import learn_reference, mix_reference
from sparda_compile.kernels.predict_blocks import (
    calibrated_or,
    standardise,
    update_prediction_reference,
)
from sparda_compile.kernels.select_blocks import select_blocks_reference
from sparda_compile.selectors import SELECTORS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sparda_compile.config import SpardaConfig

__all__ = [
    "BUDGETS",
    "MIXED",
    "REFERENCES",
    "SHARES",
    "Guess",
    "GuessSums",
    "block_mask",
    "mix",
    "num_first_steps",
]

BUDGETS: Final = (1.0, 1.25, 1.5, 2.0)
"""Blocks that a guess names, over those that a step chooses by score; always-read ones aside."""
REFERENCES: Final = ("last_scores", "previous_step", "past_steps")
"""Guesses that need nothing, which are measured beside each other one."""
MIXED: Final = ("mixed", "mixed_by_layer")
"""Guesses by two hints at once, which are measured where both are asked for."""
SHARES: Final = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Of `next_query` in a mixture, among which `mixed_by_layer` finds each layer's."""
_MIXED_OF: Final = ("ema", "next_query")
_MIXTURE: Final = "mixture"
_SHARE: Final = 0.75
_PAST_STEPS: Final = 8
_NEVER: Final = float("-inf")


def num_first_steps(config: SpardaConfig) -> int:
    """Return how many steps begin the levels, and count for nobody."""
    return CALIBRATION_WINDOW if config.ema_calibrate else WINDOW


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guess:
    """What a guess found. Shares, NaN if there was nothing to find.

    Attributes:
        name: Who guessed.
        layer: Which layer; None is all in which everyone guessed.
        budget: Blocks that it names over those that a step chooses by score.
        coverage: Share of the blocks read that were guessed.
        precision: Share of the blocks guessed that were read.
        fetched: Blocks guessed that the step before did not read, over the blocks read.
    """

    name: str
    layer: int | None
    budget: float
    coverage: float
    precision: float
    fetched: float


@dataclasses.dataclass
class _Layer:
    """What the steps before have left of one layer; tensors are [B, G, N] float32.

    Attributes:
        level: Smoothed scores, as hint `ema` keeps them.
        trend: How fast they rise.
        last_scores: Scores of the step before.
        last_read: Number of the newest step that read each block, -inf for none.
        reads: Blocks that the last 8 steps read, bool.
        found: Blocks that a mixture by each of `SHARES` has found, float64.
        mixture: What the share of `mixture` is made of, [B, G, 2].
        calibrated: Weights that `ema` is calibrated to, [B, 3], 0 before that.
        first: Scores of the first steps and tokens before them, for that.
        num_steps: Steps that were seen.
    """

    level: Tensor
    trend: Tensor
    last_scores: Tensor
    last_read: Tensor
    reads: deque[Tensor]
    found: Tensor
    calibrated: Tensor
    mixture: Tensor
    first: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    num_steps: int = 0

    @classmethod
    def like(cls, scores_BGN: Tensor) -> _Layer:
        never = torch.full_like(scores_BGN, _NEVER)
        found = torch.zeros(len(SHARES), dtype=torch.float64, device=never.device)
        reads: deque[Tensor] = deque(maxlen=_PAST_STEPS)
        calibrated = never.new_zeros(len(never), 3)
        mixture = never.new_zeros(*never.shape[:2], 2)
        kept = (never.clone(), never.clone(), reads, found, calibrated, mixture)
        return cls(never, torch.zeros_like(never), *kept)

    def past_steps(self) -> Tensor:
        """Return how many of the last steps read each block, and less than 1 for the newest."""
        if not self.reads:
            return torch.full_like(self.level, _NEVER)
        reads = torch.stack([*self.reads], dim=-1)
        number = torch.arange(1, len(self.reads) + 1, device=reads.device)
        times, newest = reads.sum(-1), (reads * number).amax(-1)
        return (times + newest / (_PAST_STEPS + 1)).masked_fill(times == 0, _NEVER)


class GuessSums:
    """Counts of guesses, by layer, who guessed and budget; `add` watches a decoding.

    Args:
        names: Who guesses.
        config: Budget and sizes, selector, and how `ema` predicts.
    """

    def __init__(self, names: Sequence[str], config: SpardaConfig) -> None:
        mixed = MIXED if set(_MIXED_OF) <= set(names) else ()
        self.names = tuple(dict.fromkeys([*names, *mixed, *REFERENCES])) if names else ()
        self._config = config
        self._layers: dict[int, _Layer] = {}
        self._before: Tensor | None = None
        self._sums: dict[tuple[int, str, float], Tensor] = {}

    def begin(self) -> None:
        """Forget the steps of other sequences; what was counted stays."""
        self._layers.clear()

    def add(
        self, number: int, scores: Mapping[str, Tensor], read_BGN: Tensor, lengths_B: Tensor
    ) -> None:
        """Count the guesses for one layer of one step, then take the step in.

        Args:
            number: Of the layer; layers come in order.
            scores: [B, G, N] float32 by `query`, and by the predictors that have scores.
            read_BGN: bool, the blocks that the query chooses.
            lengths_B: int32, tokens before the step.
        """
        own = scores["query"]
        layer = self._layers.setdefault(number, _Layer.like(own))
        if number == 0:
            self._before = None
        ranked = {name: scores[name] for name in self.names if name in scores}
        ranked |= self._from_state(layer)
        if self._before is not None and self._before.shape == own.shape:
            ranked["previous_layer"] = self._before
        if MIXED[0] in self.names and "next_query" in ranked:
            ranked |= self._mixtures(layer, ranked, read_BGN, lengths_B)
        if _MIXTURE in self.names and "next_query" in scores:
            ranked[_MIXTURE] = self._mixture(layer, scores, ranked["ema"], lengths_B)
        if layer.num_steps >= num_first_steps(self._config):
            asked = {name: ranked[name] for name in self.names if name in ranked}
            self._count(number, asked, read_BGN, layer.last_read, lengths_B)
        self._take_in(layer, own, read_BGN, lengths_B)
        self._before = own

    def _from_state(self, layer: _Layer) -> dict[str, Tensor]:
        damping = self._weights(layer)[2]
        return {
            "ema": layer.level + damping * layer.trend,
            "last_scores": layer.last_scores,
            "previous_step": layer.last_read,
            "past_steps": layer.past_steps(),
        }

    def _mixtures(
        self, layer: _Layer, ranked: Mapping[str, Tensor], read_BGN: Tensor, lengths_B: Tensor
    ) -> dict[str, Tensor]:
        """Return the mixed scores, then count what each share finds, for the steps to come."""
        asked = self._comparable(ranked["next_query"])
        mixtures = [mix(asked, ranked["ema"], share) for share in SHARES]
        best = int(layer.found.argmax()) if layer.num_steps else SHARES.index(_SHARE)
        # Groups of all shares side by side: one selection instead of one for each.
        guessed = block_mask(torch.cat(mixtures, dim=1), lengths_B, self._choice(read_BGN))
        hits = guessed.unflatten(1, (len(SHARES), -1)) & read_BGN[:, None]
        layer.found += hits.sum((0, 2, 3))
        return dict(zip(MIXED, (mix(asked, ranked["ema"], _SHARE), mixtures[best]), strict=True))

    def _mixture(
        self, layer: _Layer, scores: Mapping[str, Tensor], past: Tensor, lengths_B: Tensor
    ) -> Tensor:
        """Return the scores of hint `mixture`, then learn its share from the layer's own."""
        config, asked = self._config, self._comparable(scores["next_query"])
        mixed = mix_reference(asked, past, layer.mixture)
        right = self._comparable(scores["query"])
        choice = (config.block_size, config.sink_blocks, config.local_blocks)
        learn_reference(right, asked, past, lengths_B, layer.mixture, choice)
        return mixed

    def _comparable(self, scores: Tensor) -> Tensor:
        """Return scores that can be compared with those of other steps."""
        return scores if SELECTORS[self._config.selector].is_comparable else standardise(scores)

    def _choice(self, like: Tensor, budget: float = 1.0) -> tuple[int, int, int, int]:
        """Return how many blocks a guess names at a budget, and which of them always."""
        config, num_blocks = self._config, like.shape[-1]
        num_scored = config.replace(mode="query").num_selected(num_blocks) - config.num_forced
        count = min(config.num_forced + math.ceil(budget * num_scored), num_blocks)
        return count, config.block_size, config.sink_blocks, config.local_blocks

    def _weights(self, layer: _Layer) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
        config = self._config
        return calibrated_or(
            (config.ema_level, config.ema_trend, config.ema_damping), layer.calibrated
        )

    def _take_in(self, layer: _Layer, own: Tensor, read_BGN: Tensor, lengths_B: Tensor) -> None:
        layer.num_steps += 1
        num_first = num_first_steps(self._config)
        if self._config.ema_calibrate and layer.num_steps <= num_first:
            layer.first.append((own, lengths_B.clone()))
        if self._config.ema_calibrate and layer.num_steps == num_first:
            self._calibrate(layer)
        else:
            weights = self._weights(layer)[:2]
            update_prediction_reference(self._comparable(own), layer.level, layer.trend, weights)
        layer.last_scores = own
        layer.reads.append(read_BGN)
        step_B11 = lengths_B.float()[:, None, None]
        layer.last_read = torch.where(read_BGN, step_B11, layer.last_read)

    def _calibrate(self, layer: _Layer) -> None:
        """Find the weights by the first steps, and take these in by them."""
        scores_WBGN, before_WB = (torch.stack(part) for part in zip(*layer.first, strict=True))
        calibrate(
            scores_WBGN,
            before_WB.T.contiguous(),
            torch.full_like(before_WB[0], len(before_WB)),
            self._choice(scores_WBGN),
            layer.calibrated,
            are_comparable=SELECTORS[self._config.selector].is_comparable,
        )
        layer.level.fill_(_NEVER)
        layer.trend.zero_()
        for scores_BGN in scores_WBGN:
            weights = self._weights(layer)[:2]
            update_prediction_reference(scores_BGN, layer.level, layer.trend, weights)
        layer.first.clear()

    def _count(
        self,
        number: int,
        ranked: Mapping[str, Tensor],
        read_BGN: Tensor,
        last_read: Tensor,
        lengths_B: Tensor,
    ) -> None:
        config = self._config
        block_N = torch.arange(read_BGN.shape[-1], device=read_BGN.device)
        current_B11 = (lengths_B.long() // config.block_size)[:, None, None]
        is_forced = (block_N < config.sink_blocks) | (block_N >= current_B11 - config.local_blocks)
        was_read = last_read == (lengths_B.float() - 1.0)[:, None, None]
        wanted = read_BGN & ~is_forced
        # All that guess at once, E of them: one sort instead of one for each and budget.
        scores_EBGN = torch.stack([*ranked.values()])
        is_free = (scores_EBGN > _NEVER) & ~is_forced
        place_EBGN = _places(scores_EBGN.masked_fill(~is_free, _NEVER))
        num_forced = (is_forced & (block_N <= current_B11)).sum(-1, keepdim=True)
        for budget in BUDGETS:
            guessed = is_free & (place_EBGN < self._choice(read_BGN, budget)[0] - num_forced)
            parts = (guessed & wanted, wanted.expand_as(guessed), guessed, guessed & ~was_read)
            sums = torch.stack([part.sum((1, 2, 3)).double() for part in parts], dim=1).cpu()
            for name, mine in zip(ranked, sums, strict=True):
                key = (number, name, budget)
                self._sums[key] = self._sums[key] + mine if key in self._sums else mine

    def guesses(self) -> list[Guess]:
        """Return what was found, by who guessed, budget and layer; first over all layers."""
        found = {name for _, name, _ in self._sums}
        numbers = sorted({number for number, _, _ in self._sums})
        shared = [n for n in numbers if all((n, name, BUDGETS[0]) in self._sums for name in found)]
        guesses = []
        for name in (name for name in self.names if name in found):
            for budget in BUDGETS:
                parts = {n: self._sums.get((n, name, budget)) for n in numbers}
                of_all = [parts[n] for n in shared]
                if of_all:
                    total = torch.stack([part for part in of_all if part is not None]).sum(0)
                    guesses.append(_guess(name, None, budget, total))
                guesses += [
                    _guess(name, n, budget, part) for n, part in parts.items() if part is not None
                ]
        return guesses


def mix(asked_BGN: Tensor, level_BGN: Tensor, share: float) -> Tensor:
    """Return a weighted sum of two hints' scores; -inf where either has none.

    Args:
        asked_BGN: Scores of `next_query`, float32, comparable with the levels.
        level_BGN: What `ema` predicts, float32.
        share: Weight of the former; the latter has the rest of 1.
    """
    is_known = (asked_BGN > _NEVER) & (level_BGN > _NEVER)
    mixed = share * asked_BGN.where(is_known, 0.0) + (1.0 - share) * level_BGN.where(is_known, 0.0)
    return mixed.masked_fill(~is_known, _NEVER)


def block_mask(scores_BGN: Tensor, lengths_B: Tensor, choice: tuple[int, int, int, int]) -> Tensor:
    """Return the blocks that a selection by scores picks, [B, G, N] bool.

    Args:
        scores_BGN: float32, -inf for a block without a score.
        lengths_B: int32, tokens before the step.
        choice: How many blocks, tokens of a block, sink blocks and local blocks.
    """
    ids_BGK = select_blocks_reference(scores_BGN, lengths_B, *choice).long()
    num_blocks = scores_BGN.shape[-1]
    # An id of -1, for a block that does not exist, goes to the column behind the last one.
    mask = scores_BGN.new_zeros((*scores_BGN.shape[:2], num_blocks + 1), dtype=torch.bool)
    return mask.scatter(2, ids_BGK.where(ids_BGK >= 0, num_blocks), True)[..., :-1]


def _places(scores_EBGN: Tensor) -> Tensor:
    """Return the place of each block by its score, 0 for the best; ties go to the lower id."""
    order = torch.sort(scores_EBGN, dim=-1, descending=True, stable=True).indices
    number = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, number)


def _guess(name: str, layer: int | None, budget: float, sums: Tensor) -> Guess:
    both, wanted, guessed, fetched = sums.tolist()
    nan = float("nan")
    return Guess(
        name=name,
        layer=layer,
        budget=budget,
        coverage=both / wanted if wanted else nan,
        precision=both / guessed if guessed else nan,
        fetched=fetched / wanted if wanted else nan,
    )
