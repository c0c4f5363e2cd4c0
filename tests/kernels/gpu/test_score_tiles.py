from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import interpreting
from sparda_compile.kernels.gpu.score_tiles import (
    best_of_runs,
    place_of,
    query_vectors,
    store_runs,
    store_scores,
    window_keys,
)

BLOCKS, TOKENS, RUN = 16, 8, 8
STRIPS = 2
NONE = -7.0


@triton.jit
def _places(out, FIRST: tl.constexpr, COUNT: tl.constexpr):
    block = FIRST + tl.arange(0, COUNT)
    tl.store(out + block - FIRST, place_of(block))


def places(device, first, count):
    """Return where the scores of some blocks lie."""
    out = torch.empty(count, dtype=torch.int32, device=device)
    _places[(1,)](out, first, count)
    return out.cpu().long()


def test_neighbours_are_scored_in_turn(device):
    """Four blocks of one column lie in four tiles of a strip."""
    place = places(device, 0, 512)
    assert place[:9].tolist() == [0, 64, 128, 192, 1, 65, 129, 193, 2]
    assert place[256:258].tolist() == [256, 256 + 64]
    assert sorted(place.tolist()) == list(range(512))


@triton.jit
def _store(
    values, scores, stop, tokens, FIRST: tl.constexpr, TURN: tl.constexpr, BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    each, token = tl.arange(0, BLOCKS), tl.arange(0, TOKENS)
    place = tl.expand_dims(token * BLOCKS, AXIS) + tl.expand_dims(each, 1 - AXIS)
    # One that is no constant, as the kernel's.
    turn = tl.program_id(0) + TURN
    store_scores(scores, tl.load(values + place), FIRST, turn, stop, token, tokens, 2, BLOCKS, AXIS)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("first", "turn"), [(0, 0), (64, 1), (320, 3)])
@pytest.mark.parametrize(("count", "tokens"), [(64, 8), (30, 5)])
def test_each_fourth_block_is_written_to_its_place(device, axis, first, turn, count, tokens):
    """To the last eight whole that begins before `stop`; others are left as they were."""
    values = torch.randn(TOKENS, BLOCKS, device=device)
    scores = torch.full((TOKENS, STRIPS * 256), NONE, device=device)
    _store[(1,)](values, scores, first + count, tokens, first, turn, BLOCKS, TOKENS, axis)
    wanted = torch.full_like(scores, NONE)
    end = (count + 31) // 32 * 8
    blocks = torch.arange(first + turn, first + 4 * end, 4)
    place = places(device, 0, STRIPS * 256)[blocks]
    wanted[:tokens, place] = values[:tokens, :end]
    assert torch.equal(scores, wanted)


@triton.jit
def _store_runs(
    values, runs, stop, tokens, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, RUN: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    each, token = tl.arange(0, BLOCKS), tl.arange(0, TOKENS)
    place = tl.expand_dims(token * BLOCKS, AXIS) + tl.expand_dims(each, 1 - AXIS)
    best = best_of_runs(tl.load(values + place), RUN, AXIS)
    store_runs(runs, best, 64, stop, token, tokens, 3, RUN, AXIS)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("stop", "count", "tokens"), [(128, 8, 8), (97, 5, 5), (96, 4, 8)])
def test_a_run_is_two_columns(device, axis, stop, count, tokens):
    """Of a tile of 16 columns of four blocks, behind the first 64: runs from the eighth on."""
    values = torch.randn(TOKENS, BLOCKS, device=device)
    runs = torch.full((TOKENS, 24), NONE, device=device)
    _store_runs[(1,)](values, runs, stop, tokens, BLOCKS, TOKENS, RUN, axis)
    wanted = torch.full_like(runs, NONE)
    wanted[:tokens, 8 : 8 + count] = values.unflatten(1, (-1, 2)).amax(-1)[:tokens, :count]
    assert torch.equal(runs, wanted)


@triton.jit
def _read(
    query, positions, keys, vectors_out, position_out, keys_out, first, last, q_row, q_head,
    q_token, num_tokens, end, INTERPRETED: tl.constexpr,
):  # fmt: skip
    vectors, position, _ = query_vectors(
        query, positions, tl.program_id(0) + 1, 1, first, last, q_row, q_head, q_token, num_tokens,
        3, 4, 16, 6, 8, INTERPRETED,
    )  # fmt: skip
    column, dims = tl.arange(0, 16), tl.arange(0, 8)
    tl.store(vectors_out + column[:, None] * 8 + dims[None, :], vectors)
    tl.store(position_out + column, position)
    windows = window_keys(keys, tl.arange(0, 16) - 2, end, 7, 6, 8, INTERPRETED)
    tl.store(keys_out + column[:, None] * 8 + dims[None, :], windows)


def test_vectors_and_windows_are_read_with_zeros_where_none_is(device):
    """Row 1 and KV head 1 of two, three heads in room for four, tokens 2 to 4; 11 windows.

    Asked for are those from two before the first one on.
    """
    query = torch.randn(2, 5, 6, 6, device=device).transpose(1, 2)
    positions = torch.arange(10, device=device, dtype=torch.int32).view(2, 5)
    keys = torch.randn(16, 7, device=device)
    vectors, read = torch.empty(2, 16, 8, device=device)
    position = torch.empty(16, dtype=torch.int32, device=device)
    places = (2, 5, *query.stride()[:3], 5, 11)
    _read[(1,)](query, positions, keys, vectors, position, read, *places, interpreting())
    wanted = torch.zeros(4, 4, 8, device=device)
    wanted[:3, :3, :6] = query[1, 3:, 2:5].transpose(0, 1)
    assert torch.equal(vectors.view(4, 4, 8), wanted)
    assert position.view(4, 4)[:, 0].tolist() == [7, 8, 9, -1]
    wanted = torch.zeros(16, 8, device=device)
    wanted[2:13, :6] = keys[:11, :6]
    assert torch.equal(read, wanted)
