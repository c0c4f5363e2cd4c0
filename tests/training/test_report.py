from __future__ import annotations

import math

from sparda_compile.training.report import StepReport, tokens_per_s


def test_loss_and_recall_are_means_over_the_layers():
    report = StepReport(3, {0: 0.5, 4: 1.5}, {0: 0.25, 4: 0.75}, 0.1, 640, 2.0)
    assert (report.loss, report.recall) == (1.0, 0.5)


def test_recall_is_unknown_if_that_of_a_layer_is():
    assert math.isnan(StepReport(1, {0: 0.5, 1: 0.5}, {0: 0.5, 1: math.nan}, 0.1, 64, 1.0).recall)


def test_rate_is_that_of_all_steps_but_the_first():
    first, second, third = (
        StepReport(n, {0: 0.5}, {0: 0.5}, 0.1, 600, seconds)
        for n, seconds in ((1, 100.0), (2, 2.0), (3, 1.0))
    )
    assert (first.tokens_per_s, second.tokens_per_s) == (6.0, 300.0)
    assert tokens_per_s([first, second, third]) == 400.0
    assert tokens_per_s([first]) == 6.0
