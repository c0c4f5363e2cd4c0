"""Tokens take turns in one scratch of scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile.kernels import workspace
from sparda_compile.kernels.asked import Asked
from sparda_compile.kernels.gpu.score_turns import Blocks, Turns
from sparda_compile.kernels.workspace import RUN_BLOCKS, SCORED_TOGETHER, STRIP_BLOCKS
from sparda_compile.selectors import Geometry

BATCH, GROUPS, TOKENS, PAST, SIZE = 2, 3, 300, 1000, 16
PAIRS = BATCH * GROUPS


def asked(selector="infllm2", num_blocks=2000, spread=1):
    query = torch.zeros(BATCH, GROUPS, TOKENS, 16)
    pooled = [torch.zeros(BATCH, GROUPS, 4 * num_blocks, 16)]
    none = torch.zeros(BATCH, TOKENS, dtype=torch.int32)
    geometry = Geometry(num_blocks, SIZE, 8, 4)
    return Asked(query, pooled, none, none[:, 0], PAST, selector, 1.0, geometry, spread)


@pytest.mark.parametrize("blocks", Blocks)
def test_each_token_has_one_turn(monkeypatch, blocks):
    monkeypatch.setattr(workspace, "SCORE_BYTES", 1 << 16)
    turns = list(Turns.of(asked(), blocks, None, (16, 1)))
    assert len(turns) > 2
    assert [token for turn in turns for token in range(turn.begin, turn.end)] == [*range(TOKENS)]
    for turn in turns:
        rows, width = turn.scores.blocks.shape[:2], turn.scores.blocks.shape[2]
        assert rows == (PAIRS, turn.end - turn.begin)
        assert width % STRIP_BLOCKS == 0
        assert width >= turn.num_blocks


def test_turns_take_the_same_memory(monkeypatch):
    monkeypatch.setattr(workspace, "SCORE_BYTES", 1 << 16)
    places = {
        turn.scores.blocks.data_ptr() for turn in Turns.of(asked(), Blocks.ALL, None, (16, 1))
    }
    assert len(places) == 1


def test_blocks_are_those_that_any_token_of_a_turn_may_have():
    last = [list(Turns.of(asked(), blocks, None, (16, 1)))[-1].num_blocks for blocks in Blocks]
    # 1,300 tokens lie in 82 blocks, 1,000 in 63, and 300 new ones in 20 at most, behind another.
    assert last == [82, 63, 21]
    assert Turns.of(asked(num_blocks=70), Blocks.ALL, None, (16, 1)).num_blocks == 70
    assert Turns.of(asked(spread=2), Blocks.ALL, None, (16, 1)).num_blocks == 100


def test_runs_are_scored_where_somebody_picks_by_them():
    it = dataclasses.replace(asked(num_blocks=1 << 12), num_past=1 << 15)
    for turn in Turns.of(it, Blocks.ALL, None, (16, 1)):
        assert turn.scores.runs is None
        assert turn.widths == (turn.scores.blocks.shape[2] // STRIP_BLOCKS, 0)
        assert turn.runs is turn.scores.blocks
    turns = Turns.of(it, Blocks.ALL, 4, (16, 1))
    assert turns.in_runs
    for turn in turns:
        assert turn.runs is turn.scores.runs
        assert turn.widths[1] == turn.runs.shape[2] // SCORED_TOGETHER > 0
        assert turn.runs.shape[2] * RUN_BLOCKS >= turn.num_blocks


def test_sums_are_of_a_softmax():
    def of(selector):
        turns = Turns.of(asked(selector), Blocks.ALL, None, (16, 1))
        return turns, [sums.numel() for sums in turns.sums()]

    turns, sizes = of("infllm2")
    assert sizes == [turns.room.sums] * 2
    assert turns.room.sums > 1
    assert of("forecast")[1] == [1, 1]
