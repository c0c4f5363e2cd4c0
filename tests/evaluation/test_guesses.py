"""Guesses are counted as they are said to be, and `ema` guesses what the hint does."""

from __future__ import annotations

import math

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.evaluation.decode import decode
from sparda_compile.evaluation.guesses import (
    BUDGETS,
    MIXED,
    REFERENCES,
    SHARES,
    GuessSums,
    block_mask,
    mix,
)
from sparda_compile.evaluation.reading import read
from sparda_compile.kernels import predict_blocks
from sparda_compile.kernels.begin_prediction import WINDOW
from sparda_compile.kernels.calibrate import calibrate
from sparda_compile.selectors import SELECTORS
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
    # Two blocks are chosen by score: three are named at 1.5, beside the sink and the current one.
    guess = watched.at("last_scores", 1.5)
    assert (guess.coverage, guess.precision, guess.fetched) == (0.5, pytest.approx(1 / 3), 0.5)


def test_the_newest_steps_are_named_newest_first(monkeypatch):
    watched = Watched(monkeypatch, "ema")
    for best in ((3, 4), (5, 6), (7, 8), (5, 3)):
        watched.step(scores_of(*best))
    found = [watched.at("previous_step", budget).coverage for budget in BUDGETS]
    # Of three steps with two blocks each. The last one names (7, 8); at 1.25, which is three
    # blocks, and at 1.5 also the lower one of (5, 6), at 2 both.
    assert found == pytest.approx([0.0, 1 / 6, 1 / 6, 1 / 6])
    assert watched.at("previous_step", 1.25).precision == pytest.approx(1 / 8)
    assert watched.at("previous_step", 2.0).precision == pytest.approx(1 / 10)


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


def test_past_steps_count_how_often_a_block_was_read_then_how_lately(monkeypatch):
    watched = Watched(monkeypatch, "ema")
    for best in ((3, 4), (3, 5), (6, 7)):
        watched.step(scores_of(*best))
    layer = watched.sums._layers[0]
    times = layer.past_steps()[0, 0]
    assert times.argsort(descending=True)[2:7].tolist() == [3, 6, 7, 5, 4]
    assert times[3] == 2 + 2 / 9
    assert times[8] == -math.inf
    for _ in range(8):
        watched.step(scores_of(8, 9))
    assert torch.where(layer.past_steps()[0, 0] > -math.inf)[0].tolist() == [0, 8, 9, 16]


def by_hand(asked, level, share):
    """Return the mixed scores of one group, block by block."""
    return [
        share * a + (1 - share) * b if -math.inf not in (a, b) else -math.inf
        for a, b in zip(asked, level, strict=True)
    ]


@pytest.mark.parametrize("share", SHARES)
def test_a_mixture_is_a_weighted_sum_of_what_both_know(share):
    asked, level = torch.rand(2, 1, 1, 9)
    asked[..., 2], level[..., 2:4] = -math.inf, -math.inf
    want = by_hand(asked[0, 0].tolist(), level[0, 0].tolist(), share)
    assert mix(asked, level, share)[0, 0].tolist() == pytest.approx(want)


def test_mixtures_find_what_neither_hint_does_alone(monkeypatch):
    """Each hint knows one of two blocks, and ranks the other behind what nobody reads."""
    scores, asked = scores_of(5, 6), scores_of(5, 7)
    watched = Watched(monkeypatch, "ema", "next_query", ema_level=1.0)
    before = scores_of(6, 7)
    before[..., 7] = before[..., 5] = -30.0
    asked[..., 6] = 0.0
    asked[..., 7] = 1.0
    watched.step(before, next_query=asked)
    watched.step(scores, next_query=asked)
    assert watched.at("ema").coverage == watched.at("next_query").coverage == 0.5
    mixed = by_hand(asked[0, 0].tolist(), before[0, 0].tolist(), 0.75)
    best = set(sorted(range(1, 16), key=lambda block: -mixed[block])[:2])
    assert watched.at("mixed").coverage == len(best & {5, 6}) / 2


def test_a_layer_is_mixed_by_what_found_most_before(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    watched = Watched(monkeypatch, "ema", "next_query")
    level = torch.full((1, 1, BLOCKS), -math.inf)
    found = dict.fromkeys(SHARES, 0)
    both = wanted = 0
    for number in range(12):
        scores, asked = torch.rand(2, 1, 1, BLOCKS, generator=generator)
        choice = (4, SIZE, 1, 0)
        masks = {s: block_mask(mix(asked, level, s), watched.lengths, choice) for s in SHARES}
        read = block_mask(scores, watched.lengths, choice)
        if number >= 1:
            best = max(SHARES, key=lambda share: (found[share], -share))
            free = read[..., 1 : int(watched.lengths) // SIZE]
            both += int((masks[best][..., 1 : int(watched.lengths) // SIZE] & free).sum())
            wanted += int(free.sum())
        for share in SHARES:
            found[share] += int((masks[share] & read).sum())
        watched.step(scores, next_query=asked)
        level = scores if number == 0 else 0.5 * scores + 0.5 * level
    assert len(set(found.values())) > 1
    assert watched.at("mixed_by_layer").coverage == pytest.approx(both / wanted)


def test_scores_that_cannot_be_compared_are_mixed_in_one_scale(monkeypatch):
    found = []
    for factor in (1.0, 1000.0):
        watched = Watched(monkeypatch, "ema", "next_query", selector="quest")
        generator = torch.Generator().manual_seed(2)
        for _ in range(6):
            scores, asked = torch.rand(2, 1, 1, BLOCKS, generator=generator)
            watched.step(scores, next_query=factor * asked)
        found.append([watched.at(name, budget) for name in MIXED for budget in BUDGETS])
    assert found[0] == found[1]


def test_a_guess_names_what_a_selection_by_its_scores_would(monkeypatch):
    """With ties, blocks that were never scored, and lengths in which few blocks exist."""
    monkeypatch.setattr("sparda_compile.evaluation.guesses.WINDOW", 0)
    generator = torch.Generator().manual_seed(4)
    values = torch.tensor([-math.inf, 0.0, 1.0, 0.5, -1.0])
    lengths = torch.tensor([37, 100, 250, 319], dtype=torch.int32)
    config = CONFIG.replace(local_blocks=1, sink_blocks=2)
    guess = values[torch.randint(0, 5, (4, 3, BLOCKS), generator=generator)]
    scores = torch.rand(4, 3, BLOCKS, generator=generator)
    read = block_mask(scores, lengths, (6, SIZE, 2, 1))
    sums = GuessSums(["next_query"], config)
    sums.add(0, {"query": scores, "next_query": guess}, read, lengths)
    block = torch.arange(BLOCKS)
    current = (lengths // SIZE)[:, None, None]
    free = (block >= 2) & (block < current - 1)
    for found in (g for g in sums.guesses() if g.name == "next_query" and g.layer is None):
        count = 4 + math.ceil(found.budget * 2)
        named = block_mask(guess, lengths, (count, SIZE, 2, 1)) & free & (guess > -math.inf)
        assert found.coverage == pytest.approx(float((named & read).sum() / (read & free).sum()))
        assert found.precision == pytest.approx(float((named & read).sum() / named.sum()))


@pytest.mark.parametrize("selector", ["infllm2", "quest"])
def test_a_calibrated_guess_is_that_of_the_predictor_with_what_was_found(monkeypatch, selector):
    """The first steps decide; they are then taken in by what they decided, and count for nobody."""
    monkeypatch.setattr("sparda_compile.evaluation.guesses.CALIBRATION_WINDOW", 20)
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(30, 1, 2, BLOCKS, generator=generator) + torch.rand(1, 1, 2, BLOCKS)
    watched = Watched(monkeypatch, "ema", ema_calibrate=True, selector=selector)
    for scores in steps:
        watched.step(scores)
    choice, rule = (4, SIZE, 1, 0), SELECTORS[selector]
    before = (LENGTHS + torch.arange(20)).int()[None]
    weights, rows = torch.zeros(1, 3), steps[:20].clone()
    calibrate(rows, before, torch.tensor([20]), choice, weights, are_comparable=rule.is_comparable)
    assert weights[0, 0] > 0.0
    level, trend = torch.full((1, 2, BLOCKS), -math.inf), torch.zeros(1, 2, BLOCKS)
    both = wanted = 0
    for number, scores in enumerate(steps):
        lengths = LENGTHS + number
        free = slice(1, int(lengths) // SIZE)
        guess = block_mask(level + weights[0, 2] * trend, lengths, choice)[..., free]
        read = block_mask(scores, lengths, choice)[..., free]
        if number >= 20:
            both += int((read & guess).sum())
            wanted += int(read.sum())
        scores = scores if rule.is_comparable else predict_blocks.standardise(scores)
        predict_blocks.update_prediction_reference(scores, level, trend, weights[0, :2].tolist())
    assert watched.at("ema").coverage == pytest.approx(both / wanted)


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
    for _ in range(WINDOW):
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
    assert GuessSums(["ema", "next_query"], CONFIG).names[2:4] == MIXED
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
    assert {name for name, _, _ in found} == {"ema", "next_query", *MIXED, *REFERENCES}
    assert {layer for name, layer, _ in found if name in MIXED} == {None, 1}
    for (name, layer, _), guess in found.items():
        assert 0.0 <= guess.coverage <= 1.0
        assert 0.0 < guess.precision <= 1.0
        wider = found[name, layer, 2.0]
        assert guess.coverage <= wider.coverage
        assert guess.fetched <= wider.fetched
    assert found["previous_step", 0, 1.0].fetched == 0.0
