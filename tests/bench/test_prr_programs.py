"""Programs of one layer, under engines that do a side stream's work as late as waits allow."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.bench.prr_case import MOST_ERROR, PrrCase, attend_exactly, error_of
from sparda_compile.bench.prr_programs import (
    Speculation,
    attend,
    engine_for,
    every_step,
    predict,
    query_step,
    score,
    select,
    speculating_step,
    update,
)
from sparda_compile.isa import counters
from sparda_compile.isa.engines import CudaEngine, DeferredEngine, ImmediateEngine
from sparda_compile.kernels.predict_blocks import update_prediction_reference

CPU = torch.device("cpu")


@pytest.fixture
def case(small_layer):
    return PrrCase(CPU, small_layer)


def predictions(case, coverage=5 / 7, width=10):
    steps = range(case.shape.steps)
    return [[case.predict(layer, s, width, coverage) for s in steps] for layer in case.layers]


def worst(case, outputs):
    layer = case.layers[0]
    exact = [
        attend_exactly(query, layer.pages, ids, case.scale)
        for query, ids in zip(layer.queries, layer.ids, strict=True)
    ]
    return max(error_of(*pair) for pair in zip(outputs, exact, strict=True))


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("updates", [False, True])
def test_speculation_is_right_however_late_the_side_streams_are(case, seed, updates):
    setting = Speculation(predictions(case), updates=updates)
    engine = DeferredEngine(seed)
    outputs = every_step(case, speculating_step(case, setting), engine)()
    assert engine.num_pending == 0  # joined at the end, as a captured graph has to be
    assert worst(case, outputs) < MOST_ERROR
    again = every_step(case, speculating_step(case, setting), ImmediateEngine())()
    assert all(map(torch.equal, outputs, again))


def test_what_is_predicted_changes_no_bit(case):
    few, all_of_it = (
        every_step(
            case, speculating_step(case, Speculation(predictions(case, c))), DeferredEngine()
        )()
        for c in (0.0, 1.0)
    )
    assert all(map(torch.equal, few, all_of_it))
    assert worst(case, few) < MOST_ERROR


def test_serial_program_is_right(case):
    outputs = every_step(case, query_step(case), ImmediateEngine())()
    assert worst(case, outputs) < MOST_ERROR
    assert int(case.counters[counters.MISSES]) == 0  # every block has its page


def test_union_takes_in_what_was_not_selected(case):
    setting = Speculation(predictions(case), union=True)
    outputs = every_step(case, speculating_step(case, setting), ImmediateEngine())()
    assert worst(case, outputs) > 10 * MOST_ERROR


def test_repairs_and_waste_are_as_stated(case):
    setting = Speculation(predictions(case))
    every_step(case, speculating_step(case, setting), ImmediateEngine())()
    pairs = len(case.layers) * case.shape.steps * 4
    # Ten are predicted: five of the seven that are read before the current one, itself, and four.
    assert int(case.counters[counters.REPAIRED]) == pairs * (2 + 1)
    assert int(case.counters[counters.WASTED]) == pairs * 4


@pytest.mark.parametrize("updates", [False, True])
def test_only_an_update_moves_the_predictor(case, updates):
    layer = case.layers[0]
    level, trend = layer.level.clone(), layer.trend.clone()
    scores = [score(case, layer, step) for step in range(case.shape.steps)]
    setting = Speculation(predictions(case), updates=updates)
    every_step(case, speculating_step(case, setting), DeferredEngine())()
    if updates:
        for each in scores:
            update_prediction_reference(each, level, trend, (0.4, 0.3))
    torch.testing.assert_close(layer.level, level)
    torch.testing.assert_close(layer.trend, trend)


def test_prediction_finds_what_scores_say(case):
    layer = case.layers[0]
    layer.level.fill_(float("-inf"))
    scores = score(case, layer, 1)
    update(case, layer, scores)
    ahead = layer.ids[1].new_empty(2, 2, case.shape.selected)
    predict(case, layer, torch.tensor([case.shape.selected], dtype=torch.int32), ahead)
    # The token to come is in the next block, so the oldest local block is one among many.
    for found, read in zip(ahead.flatten(0, 1), layer.ids[1].flatten(0, 1), strict=True):
        assert {0, 21, 22, 23} <= set(found.tolist())
        assert len(set(found.tolist()) & set(read.tolist())) >= case.shape.selected - 1


def test_parts_are_those_of_the_serial_program(case):
    layer = case.layers[0]
    ids, page_ids = select(case, layer, score(case, layer, 2))
    assert torch.equal(ids, layer.ids[2])
    assert torch.equal(page_ids, ids)
    serial = every_step(case, query_step(case), ImmediateEngine())()
    assert torch.equal(attend(case, layer, 2, ids, page_ids), serial[2])


def test_a_cpu_has_one_stream():
    assert isinstance(engine_for(CPU), ImmediateEngine)


@pytest.mark.gpu
def test_a_gpu_captures_both_streams():
    from sparda_compile.bench.prr_case import DecodeShape
    from sparda_compile.bench.timing import graphs_us

    device = torch.device("cuda")
    case = PrrCase(device, DecodeShape(16384, steps=2))
    steps = range(2)
    predicted = [[case.predict(layer, s, 144, 0.9) for s in steps] for layer in case.layers]
    engine = engine_for(device)
    assert isinstance(engine, CudaEngine)
    setting = Speculation(predicted, updates=True)
    run = every_step(case, speculating_step(case, setting), engine)
    assert worst(case, run()) < MOST_ERROR
    assert graphs_us({"": run}, 2)[""][0] > 0
