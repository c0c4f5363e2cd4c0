"""Made-up prompts: which blocks tokens read, and what attention of them has to be."""

from __future__ import annotations

import dataclasses

import pytest
import torch

prompt_case = pytest.importorskip("sparda_compile.bench.prompt_case")
draw_block_ids, Case, Shape = prompt_case.draw_block_ids, prompt_case.Case, prompt_case.Shape

CPU = torch.device("cpu")
SMALL = Shape(tokens=24, past=256, heads=8, block=8, dim=16, sink=1, local=2, scored=4)
ALONE = dataclasses.replace(SMALL, past=0, tokens=200)


def test_neighbours_share_nine_tenths_of_the_scored_blocks():
    shape = dataclasses.replace(SMALL, tokens=200, block=16, past=16 * 2048, scored=40)
    ids = draw_block_ids(CPU, shape, 2)
    assert ids.shape == (1, 2, 200, 44)
    assert (ids.diff(dim=-1) > 0).all()
    assert ids[0, :, :, 0].eq(0).all()
    assert torch.equal(ids[0, 0, :, -1], (2048 + torch.arange(200) // 16).int())
    scored = ids[0, :, :, 1:41]
    assert scored.max() < 2048 - 2
    shared = (scored[:, 1:] == scored[:, :-1]).float().mean()
    assert 0.89 < shared < 0.92


def test_without_a_past_tokens_read_what_is_before_them():
    ids = draw_block_ids(CPU, ALONE, 2)[0].long()
    assert ids.shape == (2, 200, 8)
    for token in range(200):
        for group in range(2):
            own = ids[group, token]
            read = own[own >= 0]
            current = token // 8
            assert (own[len(read) :] == -1).all()
            assert (read.diff() > 0).all()
            assert (read[0], read[-1]) == (0, current)
            # All of them while they are few, then sink, scored, local and current ones.
            assert len(read) == min(current + 1, 8)
            assert set(range(max(current - 2, 0), current + 1)) <= set(read.tolist())
    late = ids[:, 150:]
    shared = (late[:, 1:, None] == late[:, :-1, :, None]).any(-1).float().mean()
    assert shared > 0.8


def dense(case, token, head, blocks):
    """One row of attention, written down."""
    keys, values = case.gathered
    group = head * case.groups // case.shape.heads
    position = case.shape.past + token
    places = [p for p in range(position + 1) if blocks is None or p // case.shape.block in blocks]
    scores = keys[0, group, places].double() @ case.query[0, head, token].double()
    return (scores * case.shape.dim**-0.5).softmax(0) @ values[0, group, places].double()


@pytest.mark.parametrize("shape", [SMALL, ALONE])
def test_error_is_measured_against_what_a_token_reads(shape):
    case = Case(CPU, shape, 2)
    for is_dense in (False, True):
        out = torch.full_like(case.query, float("nan"), dtype=torch.double)
        for token in torch.linspace(0, shape.tokens - 1, 8).long().tolist():
            for head in range(8):
                own = set(case.ids[0, head // 4, token].tolist())
                out[0, head, token] = dense(case, token, head, None if is_dense else own)
        assert case.error(out, dense=is_dense) < 1e-12
        out[0, 3, 0] *= 2
        assert case.error(out, dense=is_dense) > 0.01
    assert case.error(case.query) > 0.5


@pytest.mark.parametrize("shape", [SMALL, dataclasses.replace(ALONE, tokens=40)])
def test_our_attention_reads_the_blocks_that_were_drawn(shape):
    case = Case(CPU, shape, 2)
    case.stage()
    assert case.error(case.attend()) < prompt_case.MOST_ERROR
    if shape.past:
        assert case.error(case.attend(), dense=True) > prompt_case.MOST_ERROR


def test_all_keys_are_those_of_pages_and_then_the_new_ones():
    case = Case(CPU, SMALL, 2)
    keys, values = case.gathered
    assert keys.shape == values.shape == (1, 2, 256 + 24, 16)
    assert torch.equal(keys[0, 1, 8 * 5 + 3], case.pages[0, 1, 5, 0, 3])
    assert torch.equal(values[0, 0, 8 * 31 + 7], case.pages[0, 0, 31, 1, 7])
    assert torch.equal(values[0, 1, 256 + 10], case.kv[1][0, 1, 10])


def test_flop_count_the_keys_of_each_token():
    case = Case(CPU, SMALL, 2)
    assert case.flop == 4 * 24 * 8 * 8 * 8 * 16
    assert case.dense_flop == 4 * 8 * 16 * sum(256 + token + 1 for token in range(24))
    alone = Case(CPU, ALONE, 2)
    per_block = 4 * 4 * 8 * 16  # heads of a group, tokens of a block, channels
    assert alone.flop == per_block * int((alone.ids >= 0).sum()) < alone.dense_flop * 8
