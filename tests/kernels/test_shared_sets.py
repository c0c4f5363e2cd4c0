"""Runs of neighbouring tokens read what the first of them picks."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import ops
from sparda_compile.kernels import select_tokens as room
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.kernels.shared_sets import leads_of
from tests.kernels.test_select_tokens import (
    BLOCKS,
    CHOICE,
    GEOMETRY,
    MASKS,
    SELECTORS,
    SIZE,
    case,
    select,
)

assert ops.OPS
LENGTHS = (130, 57)


def shared_select(selector, query, tensors, mask, lengths, shared):
    return room.select_tokens(
        query, tensors, number_tokens(mask, lengths)[0], lengths, int(lengths.max()), selector, 0.3,
        BLOCKS, SIZE, 8, 4, *CHOICE,
        GEOMETRY.short_list if SELECTORS[selector].has_short_list else 0, shared=shared,
    )  # fmt: skip


@pytest.mark.parametrize("shared", [1, 2, 8, 16])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("selector", ["infllm2", "quest", "forecast", "nosa", "nosa_forecast"])
def test_a_run_reads_what_its_first_token_picks(selector, mask, shared):
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)[: len(mask)]
    query, tensors = case(selector, lengths, mask)
    own = select(selector, query, tensors, mask, lengths)
    got = shared_select(selector, query, tensors, mask, lengths, shared)
    positions = number_tokens(mask, lengths)[0]
    for row, places in enumerate(positions):
        real = torch.where(places >= 0)[0].tolist()
        lead = None
        for column in real:
            if lead is None or places[column] % shared == 0:
                lead = column
            assert torch.equal(got[row, :, column], own[row, :, lead])
    assert (got[~mask[:, None].expand(got.shape[:3])] == -1).all()


def test_every_token_has_a_lead_of_its_run():
    mask = torch.arange(30) % torch.tensor([[4], [7], [31]]) > 0
    mask[2] = False
    lengths = torch.tensor([5, 0, 9], dtype=torch.int32)
    positions = number_tokens(mask, lengths)[0]
    leads = leads_of(positions, lengths, 8)
    assert leads.columns.shape == leads.positions.shape == (3, 5)
    for row in range(2):
        for column in torch.where(mask[row])[0].tolist():
            lead = int(leads.runs[row, column])
            place = int(leads.positions[row, lead])
            assert place // 8 == int(positions[row, column]) // 8
            assert place == max(place // 8 * 8, int(lengths[row]))
            assert positions[row, leads.columns[row, lead]] == place
    assert leads.positions[2].eq(-1).all()


def test_past_and_new_blocks_apart_are_the_same():
    mask = torch.ones(1, 40, dtype=torch.bool)
    lengths = torch.tensor([130], dtype=torch.int32)
    query, tensors = case("forecast", lengths, mask)
    positions = number_tokens(mask, lengths)[0]
    choice = (CHOICE[0], 1, 2)
    sizes = ("forecast", 0.3, BLOCKS, SIZE, 8, 4, *choice)
    near = room.select_past(query, tensors, positions, lengths, 130, *sizes, 8)
    at_once = room.select_tokens(query, tensors, positions, lengths, 130, *sizes, 0, shared=8)
    in_two = room.select_tokens(query, tensors, positions, lengths, 130, *sizes, 0, *near, 8)
    assert torch.equal(at_once, in_two)
