from __future__ import annotations

import pytest
import torch

from sparda_compile.bench import prr_others
from sparda_compile.bench.prr_case import MOST_ERROR, PrrCase, attend_exactly, error_of
from sparda_compile.bench.refusals import REFUSALS

CPU = torch.device("cpu")


@pytest.fixture
def case(small_layer):
    return PrrCase(CPU, small_layer)


def exact(case, step):
    layer = case.layers[0]
    return attend_exactly(layer.queries[step], layer.pages, layer.ids[step], case.scale)


def test_operators_of_torch_select_what_the_trace_names(case):
    select = prr_others.torch_selection(case)
    for layer in case.layers:
        for step, ids in enumerate(layer.ids):
            assert torch.equal(select(layer, step).sort(-1).values.int(), ids)


def test_gathered_blocks_are_those_of_the_pages(case):
    layer = case.layers[1]
    ids = torch.tensor([22, 3]).expand(2, 2, 2)
    keys, values = prr_others.gather(layer.pages, prr_others.in_row(case), ids)
    for row in range(2):
        for group in range(2):
            pages = layer.pages[row, group, [22, 3]]
            assert torch.equal(keys[row, group], pages[:, 0].flatten(0, 1))
            assert torch.equal(values[row, group], pages[:, 1].flatten(0, 1))


def test_forms_of_sdpa_are_compared_by_time(case, graph_clock):
    layer = case.layers[0]
    begin = prr_others.in_row(case)
    operands = [
        (layer.queries[step], *prr_others.gather(layer.pages, begin, layer.ids[step].long()))
        for step in (0, 1)
    ]
    (name, form), found = prr_others.best_sdpa(operands)
    # On a CPU torch has no other kernel of these; the first of the clock's is the fastest.
    assert graph_clock == [["flash_folded", "flash"]]
    assert (name, found["flash_folded"], found["flash"]) == ("flash_folded", 50.0, 50.5)
    assert set(found) == {"flash_folded", "flash", "cudnn_folded", "cudnn", "efficient_folded"}
    assert found["cudnn"].startswith("RuntimeError: No ")
    for step in (0, 1):
        assert error_of(form(*operands[step]), exact(case, step)) < MOST_ERROR


def test_no_form_of_sdpa_runs(graph_clock):
    query, keys = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 3, 9)
    best, found = prr_others.best_sdpa([(query, keys, keys)])
    assert best is None
    assert "RuntimeError" in found["flash"]
    assert graph_clock == [[]]


def test_flashinfer_gets_each_pair_as_a_row_of_blocks(case, flashinfer):
    layer, begin = case.layers[0], prr_others.in_row(case)
    sparse = prr_others.BlockSparse("auto", CPU)
    for step, ids in enumerate(layer.ids):
        attend = sparse.planned(layer.queries[step], layer.pages, begin, ids)
        out = attend()
        assert out.shape == layer.queries[step].shape
        assert error_of(out, exact(case, step)) < MOST_ERROR
    assert len(sparse.plan_us) == case.shape.steps
    assert sparse.mean_plan_us() > 0


def test_flashinfer_is_not_needed(no_flashinfer):
    with pytest.raises(REFUSALS, match="flashinfer"):
        prr_others.BlockSparse("auto", CPU)
