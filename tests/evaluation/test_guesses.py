"""Guesses are counted as they are said to be, and `ema` guesses what the hint does."""

from __future__ import annotations

import math

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.evaluation.decode import decode
from sparda_compile.evaluation.guesses import BUDGETS, REFERENCES, GuessSums, block_mask
from sparda_compile.evaluation.reading import read
from sparda_compile.kernels import predict_blocks
from sparda_compile.testing import tiny_llama

SIZE, BLOCKS = 16, 20
CONFIG = SpardaConfig(
    mode="query", top_k=2, local_blocks=0, block_size=SIZE, pool_size=16, pool_stride=8,
    lowering="eager", ema_level=0.5,
)  # fmt: skip
LENGTHS = torch.tensor([BLOCKS * SIZE - 60], dtype=torch.int32)


def scores_of(*best):
    """Return scores [1, 1, N] that rank blocks in this order, the others by id behind them."""
    scores = -torch.arange(BLOCKS, dtype=torch.float32)
    for place, block in enumerate(best):
        scores[block] = 10.0 - place
    return scores[None, None]


class Watched:
    """A decoding of one layer, step by step."""

    def __init__(self, monkeypatch, *names, **settings):
        monkeypatch.setattr("sparda_compile.evaluation.guesses.WINDOW", 1)
        self.config = CONFIG.replace(**settings)
        self.sums = GuessSums(names, self.config)
        self.lengths = LENGTHS.clone()

    def step(self, scores, number=0, **others):
        choice = (self.config.num_selected(BLOCKS), SIZE, 1, 0)
        read = block_mask(scores, self.lengths, choice)
        self.sums.add(number, {"query": scores, **others}, read, self.lengths)
        self.lengths += 1

    def at(self, name, budget=1.0, layer=None):
        return next(
            g for g in self.sums.guesses()
            if (g.name, g.budget, g.layer) == (name, budget, layer)
        )  # fmt: skip


def test_coverage_precision_and_what_is_fetched(monkeypatch):
    watched = Watched(monkeypatch, "next_query")
    watched.step(scores_of(5, 6))
    watched.step(scores_of(5, 7), next_query=scores_of(7, 9))
    guess = watched.at("next_query")
    assert (guess.coverage, guess.precision, guess.fetched) == (0.5, 0.5, 1.0)
    guess = watched.at("last_scores")
    assert (guess.coverage, guess.precision, guess.fetched) == (0.5, 0.5, 0.0)
    # Four blocks are read, sink and current ones too: six are named at 1.5.
    guess = watched.at("last_scores", 1.5)
    assert (guess.coverage, guess.precision, guess.fetched) == (0.5, 0.25, 1.0)


def test_the_newest_steps_are_named_newest_first(monkeypatch):
    watched = Watched(monkeypatch, "ema")
    for best in ((3, 4), (5, 6), (7, 8), (5, 3)):
        watched.step(scores_of(*best))
    found = [watched.at("previous_step", budget).coverage for budget in BUDGETS]
    # Of three steps with two blocks each: at 1.25 one block of the step before, the lower id; at
    # 1.5 both; at 2 those of the first step too.
    assert found == pytest.approx([0.0, 1 / 6, 1 / 6, 2 / 6])


def test_ema_is_the_predictor_and_last_scores_a_weight_of_one(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(9, 1, 1, BLOCKS, generator=generator)
    found = {}
    for level in (0.5, 1.0):
        watched = Watched(monkeypatch, "ema", ema_level=level)
        for scores in steps:
            watched.step(scores)
        found[level] = watched
    same = [found[1.0].at(name, budget).coverage for budget in BUDGETS for name in ("ema",)]
    assert same == [found[1.0].at("last_scores", budget).coverage for budget in BUDGETS]
    level, trend = torch.full((1, 1, BLOCKS), -math.inf), torch.zeros(1, 1, BLOCKS)
    both = wanted = 0
    lengths, forced = LENGTHS.clone(), {0, int(LENGTHS) // SIZE}
    for number, scores in enumerate(steps):
        choice = (4, SIZE, 1, 0)
        guess = predict_blocks.predict_blocks_reference(level, trend, lengths, choice, 0.0)
        read = set(torch.where(block_mask(scores, lengths, choice)[0, 0])[0].tolist()) - forced
        if number >= 1:
            both += len(read & set(guess.flatten().tolist()))
            wanted += len(read)
        predict_blocks.update_prediction_reference(scores, level, trend, (0.5, 0.3))
        lengths += 1
    assert found[0.5].at("ema").coverage == pytest.approx(both / wanted)


def test_layers_of_all_are_those_where_everyone_guessed(monkeypatch):
    watched = Watched(monkeypatch, "previous_layer")
    for _ in range(3):
        for number in (0, 1):
            watched.step(scores_of(5, 6) if number else scores_of(5, 7), number)
    guesses = watched.sums.guesses()
    assert not [g for g in guesses if g.name == "previous_layer" and g.layer == 0]
    assert watched.at("previous_layer").coverage == watched.at("previous_layer", layer=1).coverage
    assert watched.at("previous_layer", layer=1).coverage == 0.5
    assert watched.at("previous_step", layer=0).coverage == 1.0


def test_steps_that_begin_the_levels_count_for_nobody():
    sums = GuessSums(["ema"], CONFIG)
    read = block_mask(scores_of(5, 6), LENGTHS, (4, SIZE, 1, 0))
    for _ in range(predict_blocks.WINDOW):
        sums.add(0, {"query": scores_of(5, 6)}, read, LENGTHS)
    assert sums.guesses() == []
    sums.add(0, {"query": scores_of(5, 6)}, read, LENGTHS)
    assert {guess.name for guess in sums.guesses()} == {"ema", *REFERENCES}
    sums.begin()
    sums.add(0, {"query": scores_of(1, 2)}, read, LENGTHS)
    assert {guess.coverage for guess in sums.guesses()} == {1.0}


def test_nobody_is_asked():
    assert GuessSums([], CONFIG).names == ()
    assert GuessSums(["ema"], CONFIG).names == ("ema", *REFERENCES)
    assert GuessSums([], CONFIG).guesses() == []


@pytest.mark.parametrize("selector", ["infllm2", "quest"])
def test_a_decoding_is_watched(selector):
    model = tiny_llama()
    ids = torch.randint(0, 256, (2, 300), generator=torch.Generator().manual_seed(0))
    config = CONFIG.replace(selector=selector, local_blocks=1)
    sums = GuessSums(["ema", "next_query", "forecast"], config)
    reading = read(model, ids[:, :250])
    plain = decode(model, reading, ids[:, 250:], config)
    seen = decode(model, reading, ids[:, 250:], config, guesses=sums)
    assert torch.equal(seen.logits_BSV, plain.logits_BSV)
    found = {(g.name, g.layer, g.budget): g for g in sums.guesses()}
    assert {name for name, _, _ in found} == {"ema", "next_query", *REFERENCES}
    for (name, layer, _), guess in found.items():
        assert 0.0 <= guess.coverage <= 1.0
        assert 0.0 < guess.precision <= 1.0
        wider = found[name, layer, 2.0]
        assert guess.coverage <= wider.coverage
        assert guess.fetched <= wider.fetched
    assert found["previous_step", 0, 1.0].fetched == 0.0
