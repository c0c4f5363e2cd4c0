"""What a selection of a prompt's blocks takes beside its result."""

from __future__ import annotations

import importlib

import pytest
import torch
from prompt_tensors import BATCH, GROUPS, SIZE, all_tensors, low_bit_keys, prompt_of, selected

from sparda_compile.kernels import selection_bytes, workspace
from sparda_compile.kernels.selection_bytes import (
    candidate_tiles,
    select_past_bytes,
    select_tokens_bytes,
)
from sparda_compile.kernels.workspace import SCORE_BYTES, UNION_BYTES
from sparda_compile.selectors import Geometry


def test_quest_splits_the_mean_query():
    prompt = selected(1 << 17)
    prompt.selector = "quest"
    assert select_tokens_bytes(prompt) > 0.97 * SCORE_BYTES + 2 * (1 << 17) * 128 * 12


@pytest.mark.parametrize(("past", "room", "runs"), [(1600, 1792, 0), (3000, 3072, 376)])
def test_what_is_picked_at_two_times_takes_what_each_scores(past, room, runs):
    """Rows have whole strips. Of many blocks every eight are a run, which is scored as well."""
    prompt = selected(256, blocks=4096)
    prompt.selector = "forecast"
    assert select_past_bytes(prompt) == 0
    prompt.num_past = past * 64 + 7
    vectors = 2 * 256
    assert select_past_bytes(prompt) == vectors * (room + runs) * 4 + 8  # no sums
    whole = select_tokens_bytes(prompt)
    prompt.near_ids = prompt.block_ids
    # Of 256 tokens five blocks may be new, behind another one.
    assert whole - select_tokens_bytes(prompt) == vectors * (room + runs - 256) * 4


def test_tiles_of_candidates_are_there_at_once_as_scores_and_unions_fit():
    # Of 32 query heads and 2 KV heads, 158 candidates of a long past take 324 KB a tile and pair.
    at_once = candidate_tiles(2, 2560, (8, 16), 158, 1 << 20)
    assert at_once == SCORE_BYTES // (2 * 8 * 16 * 158 * 4)
    assert candidate_tiles(2, 2560, (8, 16), 158, 5) == 5
    assert candidate_tiles(2, 1 << 15, (8, 1), 100, 1 << 20) == UNION_BYTES // (
        2 * (12 * 800 + 4 * 8192 + 4)
    )
    assert candidate_tiles(1 << 20, 2560, (8, 16), 158, 5) == 1


class TestKernels:
    """What launchers allocate is what is worked out, to the byte; nothing is launched here."""

    @pytest.fixture(autouse=True)
    def _without_launches(self, monkeypatch):
        pytest.importorskip("triton")
        names = "pick_tokens", "token_blocks", "token_masses", "token_scores"
        for name in (*names, "candidates", "low_bit_tiles"):
            module = importlib.import_module(f"sparda_compile.kernels.gpu.{name}")
            monkeypatch.setattr(module, "launch", lambda kernel, grid: lambda *_, **__: None)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "selector", ["forecast", "infllm2", "quest", "nosa", "lowbit2", "lowbit4_forecast"]
    )
    @pytest.mark.parametrize(
        ("heads", "tokens", "past"), [(2, 16, 0), (6, 700, 100), (32, 41, 640)]
    )
    @pytest.mark.parametrize("limit", [1 << 15, SCORE_BYTES])
    def test_selection(
        self, counted_bytes, monkeypatch, heads, tokens, past, selector, dtype, limit
    ):
        from sparda_compile.kernels.gpu import select_tokens

        monkeypatch.setattr(workspace, "SCORE_BYTES", limit)
        by_forecast = selector.endswith("forecast")
        given = prompt_of(GROUPS if by_forecast else heads, tokens, dtype, num_past=past)
        given.selector, given.summary = (
            selector,
            [given.bounds if selector == "quest" else given.pooled],
        )
        if selector == "nosa":
            given.summary = [torch.cat([given.pooled, given.pooled[..., :1]], -1)]
        if selector.startswith("lowbit"):
            given.summary = low_bit_keys(given, int(selector[6]))
        geometry = Geometry(given.num_blocks, SIZE, 8, 4, int(selector == "nosa"), 1, 1)
        positions = torch.zeros(BATCH, tokens, dtype=torch.int32)
        ids = torch.zeros(BATCH, GROUPS, tokens, 4, dtype=torch.int32)
        asked = select_tokens.Asked(
            given.query, given.summary, positions, given.lengths, past, selector, 0.2, geometry
        )
        with counted_bytes(all_tensors(given, [positions, ids, *given.summary])) as counted:
            select_tokens.select_tokens(asked, select_tokens.Choice(4, SIZE, 1, 1), ids)
        assert counted.peak == select_tokens_bytes(given)
        if past and (by_forecast or selector == "quest"):
            choice, known = select_tokens.Choice(4, SIZE, 1, 1), ids.float()
            held = all_tensors(given, [positions, ids, known, *given.summary])
            with counted_bytes(held) as counted:
                select_tokens.select_past(asked, choice, ids, known)
            assert counted.peak == select_past_bytes(given)
            given.near_ids = ids
            with counted_bytes(held) as counted:
                select_tokens.select_near(asked, choice, (ids, known), ids)
            assert counted.peak == select_tokens_bytes(given)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("times", [5, 12, 40])
    @pytest.mark.parametrize(
        ("heads", "tokens", "past"), [(2, 16, 640), (6, 700, 100), (32, 41, 640), (4, 900, 0)]
    )
    @pytest.mark.parametrize("limit", [1 << 15, SCORE_BYTES])
    def test_candidates(self, counted_bytes, monkeypatch, heads, tokens, past, times, dtype, limit):
        from sparda_compile.kernels.gpu import select_tokens

        for module in (workspace, selection_bytes):
            monkeypatch.setattr(module, "SCORE_BYTES", limit)
        given = prompt_of(heads, tokens, dtype, num_past=past)
        given.selector, given.summary = "lowbit2", low_bit_keys(given, 2)
        given.num_candidates = times
        positions = torch.zeros(BATCH, tokens, dtype=torch.int32)
        ids = torch.zeros(BATCH, GROUPS, tokens, 4, dtype=torch.int32)
        geometry, choice = (
            Geometry(given.num_blocks, SIZE, 8, 4),
            select_tokens.Choice(4, SIZE, 1, 1),
        )
        asked = select_tokens.Asked(
            given.query, given.summary, positions, given.lengths, past, "lowbit2", 0.2, geometry
        )
        with counted_bytes(all_tensors(given, [positions, ids, *given.summary])) as counted:
            select_tokens.select_tokens(asked, choice, ids, times)
        assert counted.peak == select_tokens_bytes(given)
