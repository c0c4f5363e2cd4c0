"""What mode `speculate` reads beside its selection if predicted blocks are kept."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.evaluation.early_reads import EarlyReads, reads_early

UNION = SpardaConfig(
    mode="speculate", repair="union", offload="never", block_size=16, top_k=2, local_blocks=1,
    sink_blocks=1, speculation_budget=1.0, ema_level=0.5,
)  # fmt: skip
LENGTHS = torch.tensor([16 * 7 + 3], dtype=torch.int32)


def scores(*best):
    found = torch.zeros(1, 1, 10)
    for place, block in enumerate(best):
        found[..., block] = 9.0 - place
    return found.masked_fill(torch.arange(10) >= 8, float("-inf"))


def blocks(mask_BGN):
    return torch.where(mask_BGN[0, 0])[0].tolist()


def test_who_reads_early():
    assert reads_early(UNION)
    for changes in ({"repair": "exact"}, {"mode": "query"}, {"top_k": None}):
        assert not reads_early(UNION.replace(**changes))


def test_the_best_of_the_steps_before_and_never_the_block_being_written():
    early = EarlyReads(UNION, 10)
    # Nothing was scored: sink and local blocks alone, of which the current one is left out.
    assert blocks(early.of(0, scores(3, 4), LENGTHS)) == [0, 6]
    assert blocks(early.of(0, scores(2, 5), LENGTHS)) == [0, 3, 4, 6]
    # Levels are 4.5 of 2 and 3, 4 of 4 and 5.
    assert blocks(early.of(0, scores(1), LENGTHS)) == [0, 2, 3, 6]


def test_layers_have_levels_of_their_own():
    early = EarlyReads(UNION, 10)
    early.of(0, scores(3, 4), LENGTHS)
    early.of(1, scores(2, 5), LENGTHS)
    assert blocks(early.of(0, scores(1), LENGTHS)) == [0, 3, 4, 6]
    assert blocks(early.of(1, scores(1), LENGTHS)) == [0, 2, 5, 6]


@pytest.mark.parametrize(("budget", "count"), [(0.0, 2), (0.5, 3), (2.0, 6)])
def test_as_many_as_the_budget_allows(budget, count):
    early = EarlyReads(UNION.replace(speculation_budget=budget), 10)
    early.of(0, scores(1, 2, 3, 4, 5), LENGTHS)
    assert len(blocks(early.of(0, scores(), LENGTHS))) == count
