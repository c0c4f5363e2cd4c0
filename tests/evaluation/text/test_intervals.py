from __future__ import annotations

import math
import random
import statistics

import pytest

from sparda_compile.evaluation.metrics import wilson_interval
from sparda_compile.evaluation.text.intervals import (
    Estimate,
    ratio_estimate,
    share_estimate,
    t_quantile,
)


@pytest.mark.parametrize(
    ("degrees", "value"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (99, 1.9842)],
)
def test_quantiles_are_those_of_tables(degrees, value):
    assert t_quantile(degrees) == pytest.approx(value, abs=1e-4)
    assert t_quantile(degrees, 0.5) == pytest.approx(0.0, abs=1e-9)


def test_equal_clusters_give_the_interval_of_their_means():
    means = [2.0, 3.5, 3.0, 5.0]
    found = ratio_estimate([10 * mean for mean in means], [10] * 4)
    half = t_quantile(3) * statistics.stdev(means) / 2.0
    assert found.value == pytest.approx(statistics.mean(means))
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


def test_clusters_count_by_their_tokens():
    found = ratio_estimate([10.0, 90.0], [10, 30])
    assert found.value == pytest.approx(100 / 40)
    # y_c - m n_c is -15 and 15.
    half = t_quantile(1) * math.sqrt(2 * (15**2 + 15**2)) / 40
    assert found.high - found.value == pytest.approx(half)


def test_one_cluster_has_no_interval():
    found = ratio_estimate([3.0], [2])
    assert found.value == 1.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_intervals_end_at_what_is_possible():
    found = ratio_estimate([1.0, 9.0], [10, 10], (0.0, 1.0))
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_19_of_20_intervals_hold_the_truth():
    """Tokens of a cluster share most of their value, so tokens alone would say far too much."""
    generator, hits = random.Random(0), 0
    for _ in range(400):
        levels = [generator.gauss(1.0, 0.5) for _ in range(4)]
        sums = [sum(generator.gauss(level, 0.1) for _ in range(8)) for level in levels]
        found = ratio_estimate(sums, [8] * 4)
        hits += found.low <= 1.0 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_right_answers_of_one_cluster_are_one_sample():
    found = share_estimate([4.0, 2.0, 4.0], [4, 4, 4])
    assert found.value == pytest.approx(10 / 12)
    assert (found.low, found.high) == wilson_interval(2.5, 3)
    assert share_estimate([1.0, 1.0], [1, 1]).low < 0.4


def test_map_takes_all_three():
    assert Estimate(0.0, -1.0, 1.0).map(math.exp) == Estimate(1.0, math.exp(-1), math.exp(1))
