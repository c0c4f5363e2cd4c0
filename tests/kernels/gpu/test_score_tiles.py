from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import interpreting
from sparda_compile.kernels.gpu.score_tiles import query_vectors, store_scores, window_keys

BLOCKS, TOKENS, RUN = 16, 8, 8
NONE = -7.0


@triton.jit
def _store(
    own, following, scores, runs, stop, tokens,
    OVERHANG: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, RUN: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    block, token = tl.arange(0, BLOCKS), tl.arange(0, TOKENS)
    place = tl.expand_dims(token * BLOCKS, AXIS) + tl.expand_dims(block, 1 - AXIS)
    store_scores(
        scores, runs, tl.load(own + place), tl.load(following + place), 16, stop, token, tokens, 5,
        1, OVERHANG, BLOCKS, TOKENS, RUN, AXIS,
    )  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("overhang", [0, 1])
@pytest.mark.parametrize(("stop", "tokens"), [(32, 8), (27, 5)])
def test_scores_lie_in_rows_of_whole_eights(device, axis, overhang, stop, tokens):
    """Of blocks 16 to 31 of 40, and of runs 2 and 3 of eight; others are left as they were."""
    own, following = torch.randn(2, TOKENS, BLOCKS, device=device)
    scores = torch.full((TOKENS, 2, 40), NONE, device=device)
    runs = torch.full((TOKENS, 2, 8), NONE, device=device)
    _store[(1,)](own, following, scores, runs, stop, tokens, overhang, BLOCKS, TOKENS, RUN, axis)
    wanted, wanted_runs = torch.full_like(scores, NONE), torch.full_like(runs, NONE)
    # Whole eights: what is behind the last block is any number, here that of the tile.
    end = -(-stop // 8) * 8
    wanted[:tokens, 0, 16:end] = own[:tokens, : end - 16]
    for run in range(2, -(-stop // RUN)):
        inside = slice(8 * run - 16, 8 * run - 8)
        best = own[:tokens, inside].amax(-1)
        if overhang:
            best = torch.maximum(best, following[:tokens, inside][:, :-1].amax(-1))
            wanted_runs[:tokens, 1, run] = following[:tokens, inside][:, -1]
        wanted_runs[:tokens, 0, run] = best
    if overhang:
        wanted[:tokens, 1, 16:end] = following[:tokens, : end - 16]
    assert torch.equal(scores, wanted)
    assert torch.equal(runs, wanted_runs)


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
    windows = window_keys(keys, tl.arange(0, 16), end, 7, 6, 8, INTERPRETED)
    tl.store(keys_out + column[:, None] * 8 + dims[None, :], windows)


def test_vectors_and_windows_are_read_with_zeros_where_none_is(device):
    """Row 1 and KV head 1 of two, three heads in room for four, tokens 2 to 4; 11 windows."""
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
    wanted[:11, :6] = keys[:11, :6]
    assert torch.equal(read, wanted)
