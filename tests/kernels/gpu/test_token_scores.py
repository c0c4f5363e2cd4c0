from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile.kernels import workspace
from sparda_compile.kernels.asked import Asked
from sparda_compile.kernels.gpu import token_scores
from sparda_compile.kernels.gpu.score_turns import Blocks
from sparda_compile.kernels.gpu.token_scores import scored_tokens
from sparda_compile.selectors import Geometry

GEOMETRY = Geometry(30, 16, 8, 4)
RATIO = 4
GROUPS, TOKENS, DIM = 2, 9, 16


def asked(device, lengths=(300, 37), dtype=torch.float32):
    """Return Forecasts of tokens behind others; NaN for windows that no token has completed."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    batch = len(lengths)
    pooled = torch.randn(batch, GROUPS, GEOMETRY.num_windows, DIM, generator=generator)
    for row, length in enumerate(lengths.tolist()):
        pooled[row, :, max((length + TOKENS - 8) // 4 + 1, 0) :] = float("nan")
    query = torch.randn(batch, GROUPS, TOKENS, DIM, generator=generator)
    positions = (lengths[:, None] + torch.arange(TOKENS)).int()
    places = (positions.to(device), lengths.to(device), int(lengths.max()))
    tensors = [pooled.to(device, dtype)]
    return Asked(query.to(device, dtype), tensors, *places, "forecast", 1.0, GEOMETRY)


def in_order(scores):
    """Return scores as blocks follow one another; in memory each fourth one does."""
    return scores.unflatten(-1, (-1, 4, 64)).transpose(-1, -2).flatten(-3)


def by_token(it, blocks, scored_from=0):
    """Return scores [B, G, T, n] of all tokens."""
    parts = [
        in_order(scores.blocks[:, : end - begin])
        for begin, end, scores in scored_tokens(it, blocks, scored_from)
    ]
    return torch.cat(parts, 1).unflatten(0, (-1, GROUPS)).cpu()


def truth(it, row, token):
    """Return the best window that touches each block, and how many blocks one does."""
    complete = max((int(it.positions[row, token]) - 8) // 4 + 1, 0)
    dots = it.tensors[0][row].cpu().double() @ it.query[row, :, token].cpu().double()[..., None]
    dots = dots[..., 0]
    dots[:, complete:] = float("-inf")
    padded = torch.nn.functional.pad(dots, (0, -dots.shape[1] % RATIO), value=float("-inf"))
    places = padded.unflatten(1, (-1, RATIO))
    reaching = torch.nn.functional.pad(places[:, :-1, -1], (1, 0), value=float("-inf"))
    return torch.maximum(places.amax(-1), reaching), touched(complete)


def touched(complete):
    """Return how many blocks some windows touch: the last one may reach into another."""
    return -(-(complete + 1) // RATIO)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_maxima_of_products(device, dtype):
    it = asked(device, dtype=dtype)
    got = by_token(it, Blocks.ALL)
    for row in range(2):
        for token in range(TOKENS):
            want, count = truth(it, row, token)
            found = got[row, :, token, :count].double()
            torch.testing.assert_close(found, want[..., :count], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [(300, 37), (304, 32), (33, 5), (7, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_parts_are_the_whole_bit_for_bit(device, lengths, dtype):
    it = asked(device, lengths, dtype)
    whole, past, new = (by_token(it, blocks) for blocks in Blocks)
    for row, length in enumerate(lengths):
        first = length // 16
        settled = max(first - 1, 0)
        assert torch.equal(past[row][..., :settled], whole[row][..., :settled])
        origin = max(first - 1, 0)
        for token in range(TOKENS):
            count = touched(max((length + token - 8) // 4 + 1, 0))
            if count > origin:
                want = whole[row, :, token, origin:count]
                assert torch.equal(new[row, :, token, : count - origin], want)


def test_the_past_is_scored_by_its_own_windows(device):
    """What new tokens complete is not there yet."""
    it = asked(device)
    before = it.tensors[0].clone()
    for row, length in enumerate((300, 37)):
        before[row, :, (length - 8) // 4 + 1 :] = float("nan")
    past = by_token(dataclasses.replace(it, tensors=[before]), Blocks.PAST)
    for row, length in enumerate((300, 37)):
        complete = (length - 8) // 4 + 1
        assert past[row][..., : touched(complete)].isfinite().all()


def test_room_follows_from_what_the_cache_holds(device):
    it = asked(device)
    widths = [by_token(it, blocks).shape[-1] for blocks in Blocks]
    # 309 tokens lie in 20 blocks; 300 in 19; 9 new ones in 2 at most, behind another one. Rows have
    # room for whole strips.
    assert widths == [256] * 3


def test_parts_and_chunks_change_nothing(device, monkeypatch):
    it = asked(device)
    want = [by_token(it, blocks) for blocks in Blocks]
    for module in (token_scores, workspace):
        monkeypatch.setattr(module, "PART_BLOCKS", 3)
    monkeypatch.setattr(workspace, "SCORE_COLUMNS", 16)
    monkeypatch.setattr(token_scores, "_WINDOWS", 16)
    monkeypatch.setattr(workspace, "SCORE_BYTES", 1)
    for blocks, whole in zip(Blocks, want, strict=True):
        got = by_token(it, blocks)
        for row, length in enumerate((300, 37)):
            seen = length if blocks is Blocks.PAST else length + TOKENS - 1
            origin = max(length // 16 - 1, 0) if blocks is Blocks.NEW else 0
            count = touched((seen - 8) // 4 + 1) - origin
            torch.testing.assert_close(
                got[row, :, -1, :count], whole[row, :, -1, :count], rtol=1e-5, atol=1e-5
            )


def test_tokens_within_the_budget_are_not_scored(device):
    it = asked(device)
    assert by_token(it, Blocks.ALL, 1000).isnan().all()


@pytest.mark.parametrize("part", [8, 256])
@pytest.mark.parametrize("blocks", [Blocks.ALL, Blocks.PAST])
def test_a_run_scores_what_its_blocks_do(device, monkeypatch, blocks, part):
    for module in (token_scores, workspace):
        monkeypatch.setattr(module, "PART_BLOCKS", part)
    monkeypatch.setattr(token_scores, "_WINDOWS", 16)
    monkeypatch.setattr(workspace, "SCORE_BYTES", 1)
    monkeypatch.setattr(workspace, "SCORE_COLUMNS", 16)
    it, found = asked(device), 0
    for begin, end, scores in scored_tokens(it, blocks, 0, 1):
        of_blocks, of_runs = in_order(scores.blocks), scores.runs
        pairs = [each.unflatten(0, (-1, GROUPS)).cpu() for each in (of_blocks, of_runs)]
        for row, length in enumerate((300, 37)):
            for token in range(end - begin):
                seen = length if blocks is Blocks.PAST else length + begin + token
                count = touched(max((seen - 8) // 4 + 1, 0))
                own, best = (each[row, :, token] for each in pairs)
                for run in range(-(-count // 8)):
                    inside = own[:, 8 * run : min(8 * run + 8, count)]
                    assert torch.equal(best[:, run], inside.amax(1))
                    found += 1
    assert found > 4


def test_runs_are_scored_where_that_saves_something(device):
    it = asked(device)
    kept = [next(scored_tokens(it, Blocks.ALL, 0, selected))[2].runs for selected in (None, 1, 2)]
    # Of 20 blocks; one lies in 8 of them, two in 16. Three runs, in a row with room for eight.
    assert [None if runs is None else runs.shape[-1] for runs in kept] == [None, 8, None]
