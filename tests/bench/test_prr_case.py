from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile.bench import prr_case
from sparda_compile.bench.prr_case import (
    DecodeShape,
    PrrCase,
    attend_exactly,
    error_of,
    listed,
)
from sparda_compile.kernels.select_blocks import select_blocks_reference
from sparda_compile.selectors import SELECTORS

CPU = torch.device("cpu")


def test_sizes_are_those_of_the_published_shapes():
    shape = DecodeShape()
    assert (shape.selected, shape.current) == (96, 2046)
    assert shape.block_bytes == 2 * 32 * 1024
    # 8 windows of 16 tokens short of what the cache has room for: the last block is empty.
    assert shape.num_windows == (2047 * 64 - 1 - 32) // 16 + 1
    assert shape.layers == 16
    large = DecodeShape(524288, 16, groups=8)
    assert large.layers == 2
    assert large.num_bytes > 2 * 524288 * 16 * 8 * 512


def test_layers_are_more_than_the_cache_holds():
    for groups in (2, 8):
        for tokens in (16384, 131072, 524288):
            for attends in (True, False):
                shape = DecodeShape(tokens, groups=groups, attends=attends)
                read = shape.pooled_bytes + attends * shape.selected * shape.block_bytes
                assert shape.layers * read > 60e6


def test_a_selector_finds_what_a_step_is_to_read(small_layer):
    case = PrrCase(CPU, small_layer)
    shape = case.shape
    assert len(case.layers) == 2
    choice = (shape.selected, shape.block, shape.sink, shape.local)
    for layer in case.layers:
        for step, query in enumerate(layer.queries):
            scores = SELECTORS["infllm2"].score(
                query, [layer.pooled], case.lengths, case.scale, shape.geometry
            )
            found = select_blocks_reference(scores, case.lengths, *choice)
            assert torch.equal(found, layer.ids[step])
            assert found[0, 0, [0, -3, -2, -1]].tolist() == [0, 20, 21, 22]


def test_steps_share_what_the_overlap_says(small_layer):
    layer = PrrCase(CPU, small_layer).layers[0]
    forced = 4
    for step, reads in enumerate(layer.reads):
        shared = (reads & layer.last(step)).sum(-1)
        assert (shared == forced + 3).all()  # three quarters of four
    changing = PrrCase(CPU, dataclasses.replace(small_layer, overlap=0.0)).layers[0]
    assert ((changing.reads[0] & changing.before).sum(-1) == forced).all()


def test_layers_and_groups_read_blocks_of_their_own(small_layer):
    one, other = PrrCase(CPU, small_layer).layers
    assert not torch.equal(one.ids[0], other.ids[0])
    assert not torch.equal(one.ids[0][0, 0], one.ids[0][0, 1])
    assert not torch.equal(one.pages, other.pages)


@pytest.mark.parametrize(
    ("budget", "coverage", "hits", "wrong"),
    [
        (8, 1.0, 4, 0),
        (8, 5 / 7, 2, 2),
        (12, 5 / 7, 2, 6),
        (12, 1.0, 4, 4),
        (8, 0.0, 0, 4),  # sink and local blocks are always predicted
        (5, 1.0, 1, 0),  # no room
    ],
)
def test_a_prediction_holds_the_stated_share(small_layer, budget, coverage, hits, wrong):
    case = PrrCase(CPU, small_layer)
    layer = case.layers[1]
    ids = case.predict(layer, 1, budget, coverage)
    assert ids.shape == (2, 2, budget)
    assert ids.dtype == torch.int32
    for guessed, reads in zip(
        ids.flatten(0, 1).tolist(), layer.reads[1].flatten(0, 1), strict=True
    ):
        assert guessed == sorted(set(guessed))
        read = set(reads.nonzero()[:, 0].tolist())
        assert {0, 20, 21, 22} <= set(guessed)
        assert len(read & set(guessed)) == 4 + hits
        assert len(set(guessed) - read) == wrong


def test_a_prediction_of_all_blocks_ends_in_none(small_layer):
    case = PrrCase(CPU, small_layer)
    ids = case.predict(case.layers[0], 0, 30, 1.0)
    assert ids[0, 0].tolist() == [*range(23), *[-1] * 7]


def test_exact_attention_is_over_the_blocks_alone():
    query, pages = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 2, 4, 8)
    ids = torch.tensor([1, 3, -1]).expand(2, 2, 3)
    out = attend_exactly(query, pages, ids, 0.3)
    assert out.dtype == torch.float64
    keys, values = (pages[1, 1, [1, 3], part].flatten(0, 1).double() for part in (0, 1))
    weights = torch.softmax(0.3 * query[1, 3, 0].double() @ keys.T, -1)
    torch.testing.assert_close(out[1, 3, 0], weights @ values)
    assert error_of(out, out) == 0.0
    assert error_of(1.5 * out, out) == pytest.approx(0.5)


def test_marked_blocks_are_listed():
    wanted = torch.zeros(1, 2, 6, dtype=torch.bool)
    wanted[0, 0, [4, 1]] = wanted[0, 1, [0, 5]] = True
    assert listed(wanted).tolist() == [[[1, 4], [0, 5]]]
    assert listed(wanted, 3).tolist() == [[[1, 4, -1], [0, 5, -1]]]


def test_a_selection_alone_has_no_pages(small_layer):
    case = PrrCase(CPU, dataclasses.replace(small_layer, attends=False))
    assert case.layers[0].pages.numel() == 0
    assert len(case.layers) == prr_case._MOST_SUMMARIES
