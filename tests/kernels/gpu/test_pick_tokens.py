from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels.gpu.pick_tokens import pick_tokens
from sparda_compile.kernels.gpu.score_tiles import IN_TURN
from sparda_compile.kernels.gpu.score_turns import Scores
from sparda_compile.kernels.gpu.select import Choice
from sparda_compile.kernels.select_blocks import select_blocks_reference
from sparda_compile.kernels.workspace import RUN_BLOCKS, STRIP_BLOCKS
from sparda_compile.selectors import Geometry
from sparda_compile.selectors.nosa import LISTED, _short_list
from sparda_compile.selectors.pooled_keys import existing_windows, windows_to_blocks

GEOMETRY = Geometry(40, 16, 8, 4, short_list=4, sink_blocks=1, local_blocks=2)
CHOICE = Choice(9, 16, 1, 2)
TOKENS = 5
GROUPS = 2


def laid_out(scores):
    """Return scores of blocks as they lie in memory: every fourth one, then their neighbours."""
    room = torch.full((*scores.shape[:-1], STRIP_BLOCKS), float("nan"))
    room[..., : scores.shape[-1]] = scores
    return room.unflatten(-1, (-1, IN_TURN)).transpose(-1, -2).flatten(-2)


def in_order(scores):
    """Return what `laid_out` was given, and NaN behind it."""
    return scores.unflatten(-1, (IN_TURN, -1)).transpose(-1, -2).flatten(-2)


class Case:
    """Scores of windows for some tokens of one sequence, and the retention score of each window."""

    def __init__(self, first_position, levels=0):
        generator = torch.Generator().manual_seed(first_position)

        def numbers(*shape):
            if levels:
                return torch.randint(0, levels, shape, generator=generator).float()
            return torch.randn(shape, generator=generator)

        self.positions = torch.arange(first_position, first_position + TOKENS).int()[None]
        windows = (GROUPS, TOKENS, GEOMETRY.num_windows)
        exists_TW = existing_windows(self.positions[0], GEOMETRY.num_windows, GEOMETRY)
        self.by_window = numbers(*windows).masked_fill(~exists_TW, float("-inf"))
        self.retention = numbers(1, GROUPS, GEOMETRY.num_windows)
        self.exists_TW = exists_TW

    def scores(self):
        """Return what the kernel before hands on, with anything where it writes nothing."""
        best = windows_to_blocks(self.by_window, GEOMETRY)
        return laid_out(best.masked_fill(best == float("-inf"), float("nan")))

    def wanted(self, choice, *, lists):
        ids = []
        for token in range(TOKENS):
            position = self.positions[:, token]
            asked = windows_to_blocks(self.by_window[None, :, token], GEOMETRY)
            if lists:
                there = self.exists_TW[None, None, token]
                kept = self.retention.masked_fill(~there, float("-inf"))
                listed = _short_list(asked, position, GEOMETRY)
                asked = windows_to_blocks(kept, GEOMETRY).masked_fill(listed, LISTED)
            ids.append(select_blocks_reference(asked, position, *choice))
        return torch.stack(ids, 2)

    def picked(self, device, choice, seen, *, lists):
        ids = torch.full((1, GROUPS, TOKENS, choice.num_selected), -7, dtype=torch.int32)
        ids = ids.to(device)
        pick_tokens(
            Scores(self.scores().to(device), None), self.retention.to(device) if lists else None,
            self.positions.to(device), ids, (0, TOKENS, seen), GEOMETRY, choice,
        )  # fmt: skip
        return ids.cpu()


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("first_position", [400, 620, 141, 3])
def test_equals_the_reference(device, first_position, lists):
    """Far behind, at the end, where the budget begins to leave blocks out, and before that."""
    case = Case(first_position)
    want = case.wanted(CHOICE, lists=lists)
    assert torch.equal(case.picked(device, CHOICE, GEOMETRY.num_blocks, lists=lists), want)


@pytest.mark.parametrize("lists", [False, True])
def test_ties_go_to_the_lower_block(device, lists):
    case = Case(400, levels=2)
    want = case.wanted(CHOICE, lists=lists)
    assert torch.equal(case.picked(device, CHOICE, GEOMETRY.num_blocks, lists=lists), want)


def test_blocks_that_no_token_has_change_nothing(device):
    case = Case(300)
    seen = -(-(300 + TOKENS) // GEOMETRY.block_size)
    want = case.picked(device, CHOICE, GEOMETRY.num_blocks, lists=True)
    assert torch.equal(case.picked(device, CHOICE, seen, lists=True), want)


def test_a_short_list_is_not_what_scores_pick(device):
    """The retention scores decide on the rest."""
    case = Case(400)
    listed, plain = (case.picked(device, CHOICE, 40, lists=lists) for lists in (True, False))
    assert not torch.equal(listed, plain)


def runs_of(scores):
    """Return what the kernel before hands on of runs: of those that no window touches anything."""
    whole = in_order(scores)[..., : GEOMETRY.num_blocks].nan_to_num(float("-inf"))
    best = whole.unflatten(-1, (-1, RUN_BLOCKS)).amax(-1)
    runs = torch.full((*best.shape[:-1], 8), float("nan"))
    runs[..., : best.shape[-1]] = best.masked_fill(best == float("-inf"), float("nan"))
    return runs


@pytest.mark.parametrize("levels", [0, 2, 5])
@pytest.mark.parametrize("first_position", [400, 620, 230, 141, 40, 3])
@pytest.mark.parametrize(
    "choice",
    [Choice(4, 16, 1, 1), Choice(3, 16, 1, 2), Choice(1, 16, 0, 0), Choice(4, 16, 0, 9)],
    ids=["three and one", "the forced ones", "one", "more forced than wanted"],
)
def test_by_runs_the_same_blocks_are_picked(device, first_position, choice, levels):
    case = Case(first_position, levels)
    scores, runs = case.scores(), runs_of(case.scores())
    want = case.wanted(choice, lists=False)
    positions = case.positions.to(device)
    for seen in (GEOMETRY.num_blocks, (first_position + TOKENS) // 16 + 1):
        ids = torch.full((1, GROUPS, TOKENS, choice.num_selected), -7, dtype=torch.int32)
        ids = ids.to(device)
        given = Scores(scores.to(device), runs.to(device))
        pick_tokens(given, None, positions, ids, (0, TOKENS, seen), GEOMETRY, choice)
        assert torch.equal(ids.cpu(), want)


def test_runs_are_read_where_they_are_fewer(device):
    """Scores of blocks alone would pick others: those of runs say so."""
    case, choice = Case(620), Choice(3, 16, 1, 0)
    runs = runs_of(case.scores())
    runs[..., 1:3] = float("-inf")
    ids = torch.empty(1, GROUPS, TOKENS, 3, dtype=torch.int32, device=device)
    given = Scores(case.scores().to(device), runs.to(device))
    pick_tokens(given, None, case.positions.to(device), ids, (0, TOKENS, 40), GEOMETRY, choice)
    inner = (ids >= 8) & (ids < 24)
    assert not inner.any()
    assert ((case.wanted(choice, lists=False) >= 8) & (case.wanted(choice, lists=False) < 24)).any()
