"""Estimates over tokens, with 95% intervals over documents.

Tokens of one document are alike, so documents are what was drawn: the clusters. With sums y_c of a
quantity and n_c of its tokens in each of C clusters,

    m   = sum y_c / sum n_c
    s^2 = C / (C - 1) * sum (y_c - m n_c)^2 / (sum n_c)^2
    m +- t(C - 1) * s                       Student's t, its 97.5% quantile

which is the cluster-robust interval of a ratio (Cochran, Sampling Techniques, section 6.3). It is
wide for two or three documents, as it should be, and there is none for one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Final

from sparda_compile.evaluation.metrics import wilson_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Estimate", "ratio_estimate", "share_estimate", "t_quantile"]

_UPPER: Final = 0.975


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval, whose ends are NaN where it has none."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> Estimate:
        """Return the estimate of a rising function of it."""
        return Estimate(*map(function, (self.value, self.low, self.high)))


def ratio_estimate(
    sums: Sequence[float],
    counts: Sequence[float],
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """Return the mean over tokens.

    Args:
        sums: Of the quantity, by cluster.
        counts: Of tokens, by cluster, above 0.
        bounds: What the quantity cannot leave; the interval is cut there.
    """
    total, num = sum(counts), len(counts)
    mean = sum(sums) / total
    if num < 2:
        return Estimate(mean, math.nan, math.nan)
    spread = sum((y - mean * n) ** 2 for y, n in zip(sums, counts, strict=True))
    half = t_quantile(num - 1) * math.sqrt(num / (num - 1) * spread) / total
    low, high = bounds
    return Estimate(mean, max(mean - half, low), min(mean + half, high))


def share_estimate(rights: Sequence[float], counts: Sequence[float]) -> Estimate:
    """Return a share of right answers, with Wilson's interval for as many samples as clusters.

    A t interval has no width where all are right. Answers of one cluster count as one sample, as if
    they were right or wrong together.

    Args:
        rights: Right answers, by cluster.
        counts: Answers, by cluster.
    """
    share, num = sum(rights) / sum(counts), len(counts)
    return Estimate(share, *wilson_interval(share * num, num))


def t_quantile(degrees: int, share: float = _UPPER) -> float:
    """Return the quantile of Student's t.

    Args:
        degrees: Of freedom, 1 or more.
        share: Probability below it, 0.5 to less than 1.
    """
    low, high = 0.0, 1.0
    while _t_below(high, degrees) < share:
        high *= 2.0
    for _ in range(100):
        middle = (low + high) / 2.0
        low, high = (middle, high) if _t_below(middle, degrees) < share else (low, middle)
    return (low + high) / 2.0


def _t_below(t: float, degrees: int) -> float:
    """Return P(T < t) for t >= 0 (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    is_odd = degrees % 2
    term = math.cos(angle) if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + is_odd, degrees, 2):
        term *= square * (k - 1) / k
        total += term
    middle = 2.0 / math.pi * (angle + sine * total) if is_odd else sine * total
    return 0.5 + middle / 2.0
