"""What is counted: right answers, distance from the dense model, and which blocks were found.

Two recalls of blocks, both at equal budget and both without the blocks that are always read (sink,
local, current), which count in every budget and which nobody has to find:

    mass recall  = attention on the blocks found / attention on all blocks to be found
    block recall = blocks that both the predictor and the true query choose / those of the query

The oracle of the mass recall chooses by the attention itself; nothing with the budget gets more.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from sparda_compile.evaluation.decode import LayerRecord

__all__ = [
    "ORACLE",
    "RecallSums",
    "bootstrap_interval",
    "kl_divergence",
    "right_answers",
    "wilson_interval",
]

ORACLE: Final = "oracle"
_Z: Final = 1.959963984540054
_NUM_RESAMPLES: Final = 1000


def right_answers(predicted_BA: Tensor, answers_BA: Tensor, *, any_order: bool) -> Tensor:
    """Return which sequences have every answer right, [B] bool.

    Args:
        predicted_BA: [B, A] int64 predicted tokens.
        answers_BA: [B, A] int64 right tokens.
        any_order: Whether the right tokens count in any order.
    """
    if any_order:
        predicted_BA, answers_BA = predicted_BA.sort(1).values, answers_BA.sort(1).values
    return (predicted_BA == answers_BA).all(1)


def kl_divergence(truth_BAV: Tensor, logits_BAV: Tensor) -> Tensor:
    """Return KL(truth || other) of the next token in nats, [B, A] float32."""
    truth = truth_BAV.float().log_softmax(-1)
    other = logits_BAV.float().log_softmax(-1)
    divergence = F.kl_div(other, truth, reduction="none", log_target=True).sum(-1)
    return divergence.clamp(min=0.0)  # Rounding can leave equal distributions below zero.


def wilson_interval(num_right: float, num_samples: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share; (0, 1) if there are no samples."""
    if not num_samples:
        return 0.0, 1.0
    share, square = num_right / num_samples, _Z * _Z
    middle = share + square / (2 * num_samples)
    spread = _Z * math.sqrt(share * (1 - share) / num_samples + square / (4 * num_samples**2))
    scale = 1 + square / num_samples
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return max(low, 0.0), min(high, 1.0)


def bootstrap_interval(found: Tensor, total: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Return a 95% interval of sum(found) / sum(total), drawing whole sequences again.

    Args:
        found: [n] float, by sequence.
        total: [n] float, by sequence.
        seed: Seed of the draws.

    Returns:
        The 2.5% and the 97.5% quantile of 1000 draws; (nan, nan) if there is nothing to find.
    """
    if not len(total) or float(total.sum()) <= 0:
        return math.nan, math.nan
    counts = _resamples(len(total), seed)
    ratios = counts @ found.double().cpu() / (counts @ total.double().cpu()).clamp(min=1e-12)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


@functools.lru_cache(maxsize=4)
def _resamples(num_samples: int, seed: int) -> Tensor:
    """Return how often each draw takes each sample, [draws, n] float64, for hundreds of shares."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(num_samples, (_NUM_RESAMPLES, num_samples), generator=generator)
    counts = torch.zeros(_NUM_RESAMPLES, num_samples, dtype=torch.float64)
    return counts.scatter_add_(1, rows, torch.ones_like(counts))


class RecallSums:
    """Sums of what was found and what was to be found, by layer, predictor and sequence."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, str], list[Tensor]] = {}

    def add(self, records: Iterable[list[LayerRecord]]) -> None:
        """Take in the steps of one batch; each sequence of it is a sample of its own."""
        batch: dict[tuple[int, str], Tensor] = {}
        for layers in records:
            for layer, record in enumerate(layers):
                for name, sums in _sums_of(record).items():
                    key = layer, name
                    batch[key] = batch[key] + sums if key in batch else sums
        for key, sums in batch.items():
            self._sums.setdefault(key, []).append(sums.cpu())

    def names(self) -> list[str]:
        """Return who chose: `query`, the oracle and the predictors that were seen."""
        return list(dict.fromkeys(name for _, name in self._sums))

    def num_layers(self) -> int:
        """Return the number of layers seen."""
        return 1 + max((layer for layer, _ in self._sums), default=-1)

    def get(self, name: str, layer: int | None = None) -> Tensor | None:
        """Return [4, n]: mass found, mass to find, blocks found, blocks to find, by sequence.

        Args:
            name: Who chose.
            layer: Which layer; None sums over the layers in which everyone chose, so that all
                have the same to find: the first layer has no layer before it.

        Returns:
            The sums, or None where `name` had nothing to go by.
        """
        layers = self._shared_layers() if layer is None else [layer]
        parts = [torch.cat(self._sums[i, name], 1) for i in layers if (i, name) in self._sums]
        return torch.stack(parts).sum(0) if parts else None

    def _shared_layers(self) -> list[int]:
        names, layers = self.names(), range(self.num_layers())
        return [i for i in layers if all((i, name) in self._sums for name in names)]


def _sums_of(record: LayerRecord) -> dict[str, Tensor]:
    """Return [4, B] sums by who chose."""
    open_BGN = ~record.forced_BGN
    mass_BGN = record.mass_BGN * open_BGN
    query_BGN = record.chosen["query"] & open_BGN
    choices = {**record.chosen, ORACLE: _best(mass_BGN, query_BGN.sum(-1))}
    total = mass_BGN.sum((1, 2))
    num_chosen = query_BGN.sum((1, 2)).float()
    sums = {}
    for name, chosen_BGN in choices.items():
        found = (mass_BGN * chosen_BGN).sum((1, 2))
        both = (query_BGN & chosen_BGN).sum((1, 2)).float()
        sums[name] = torch.stack([found, total, both, num_chosen])
    return sums


def _best(mass_BGN: Tensor, count_BG: Tensor) -> Tensor:
    """Return the `count` blocks of most mass, [B, G, N] bool."""
    order = mass_BGN.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    best: Tensor = rank < count_BG[..., None]
    return best
