from __future__ import annotations

import math

import pytest
import torch

from sparda_compile.evaluation.decode import LayerRecord
from sparda_compile.evaluation.metrics import (
    RecallSums,
    bootstrap_interval,
    kl_divergence,
    right_answers,
    wilson_interval,
)


def test_answers_in_order_and_in_any_order():
    predicted = torch.tensor([[1, 2], [2, 1], [1, 1]])
    answers = torch.tensor([[1, 2]] * 3)
    assert right_answers(predicted, answers, any_order=False).tolist() == [True, False, False]
    assert right_answers(predicted, answers, any_order=True).tolist() == [True, True, False]


def test_wilson_interval_of_known_shares():
    # Newcombe (1998), table I: 81 of 263, and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_divergence_of_coins():
    fair, biased = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.9, 0.1]]]).log()
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(kl_divergence(fair, biased)) == pytest.approx(expected, rel=1e-5)
    assert float(kl_divergence(fair, fair + 3.0)) == pytest.approx(0.0, abs=1e-6)


def test_bootstrap_interval():
    found, total = torch.tensor([1.0, 0.0] * 50), torch.ones(100)
    low, high = bootstrap_interval(found, total)
    # The deviation of a mean of 100 fair coins is 0.05.
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.03)
    assert bootstrap_interval(found, total) == (low, high)
    assert bootstrap_interval(total, total) == pytest.approx((1.0, 1.0))
    assert all(map(math.isnan, bootstrap_interval(found * 0, found * 0)))


def mask(*rows):
    return torch.tensor(rows, dtype=torch.bool)[:, None]


def record(**chosen):
    """Return a record of five blocks; the first and the last are always read."""
    mass = torch.tensor([[0.3, 0.4, 0.1, 0.1, 0.1], [0.5, 0.0, 0.2, 0.2, 0.1]])[:, None]
    forced = mask([1, 0, 0, 0, 1], [1, 0, 0, 0, 1])
    query = mask([1, 1, 0, 0, 1], [1, 1, 0, 0, 1])
    return LayerRecord(mass, forced, query, {"query": query, **chosen})


def test_recalls_leave_out_what_is_always_read():
    sums = RecallSums()
    sums.add([[record()]])
    mass, all_mass, blocks, all_blocks = sums.get("query", 0)
    assert mass.tolist() == pytest.approx([0.4, 0.0])
    assert all_mass.tolist() == pytest.approx([0.6, 0.4])
    assert blocks.tolist() == all_blocks.tolist() == [1.0, 1.0]


def test_oracle_takes_the_best_blocks_of_the_same_number():
    sums = RecallSums()
    sums.add([[record()]])
    mass, _, blocks, _ = sums.get("oracle", 0)
    assert mass.tolist() == pytest.approx([0.4, 0.2])
    assert blocks.tolist() == [1.0, 0.0]


def test_sums_over_steps_layers_and_batches():
    guess = mask([1, 0, 1, 0, 1], [1, 1, 0, 0, 1])
    sums = RecallSums()
    sums.add([[record(), record(guess=guess)]] * 2)
    sums.add([[record(), record()]])
    assert sums.num_layers() == 2
    assert set(sums.names()) == {"query", "guess", "oracle"}
    assert sums.get("guess", 0) is None
    mass, all_mass, blocks, all_blocks = sums.get("guess")
    assert mass.tolist() == pytest.approx([0.2, 0.0])
    assert all_mass.tolist() == pytest.approx([1.2, 0.8])
    assert (blocks.tolist(), all_blocks.tolist()) == ([0.0, 2.0], [2.0, 2.0])
    # Layer 0 is left out for everyone, as somebody chose nothing there.
    assert sums.get("query")[1].tolist() == pytest.approx([1.2, 0.8, 0.6, 0.4])


def test_empty_sums():
    assert RecallSums().get("query") is None
    assert RecallSums().num_layers() == 0
