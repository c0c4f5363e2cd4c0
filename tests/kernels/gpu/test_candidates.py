from __future__ import annotations

import dataclasses

import pytest
import torch
from low_bit_prompt import Prompt
from picked import first

from sparda_compile.kernels import selection_bytes, workspace
from sparda_compile.kernels.gpu import candidates
from sparda_compile.kernels.gpu import select_tokens as kernels
from sparda_compile.kernels.gpu.select import Choice
from sparda_compile.selectors import Geometry

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOW_BIT = ["lowbit2", "lowbit4"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selector", LOW_BIT)
def test_kernels_equal_the_reference(device, selector, dtype):
    """A turn behind a past of 60 blocks, with holes behind a short one, and left padding."""
    mask = [first(4, 4), [i != 1 for i in range(4)], [i > 2 for i in range(4)]]
    sizes, geometry, choice = (1, 4, 24), Geometry(70, 16, 8, 4), Choice(9, 16, 1, 2)
    prompt = Prompt(selector, [1000, 170, 90], mask, sizes, geometry, dtype=dtype)
    ids = prompt.check(device, choice, num_candidates=14)
    assert (ids >= 0).sum(-1).unique().tolist() == [0, 6, 9]
    assert not torch.equal(ids, prompt.check(device, choice))


def test_tokens_with_no_more_blocks_than_candidates_score_all_of_them(device):
    """Beside tokens with more, too, and bit for bit: by the kernels that score all."""
    choice, geometry = Choice(5, 16, 1, 1), Geometry(20, 16, 8, 4)
    prompt = Prompt("lowbit2", [75], [first(80, 80)], (1, 2, 16), geometry)
    few = prompt.position[0] < 6 * 16
    ids, of_all = prompt.check(device, choice, num_candidates=6), prompt.check(device, choice)
    assert torch.equal(ids[:, :, few], of_all[:, :, few])
    assert not torch.equal(ids[:, :, ~few], of_all[:, :, ~few])
    assert torch.equal(prompt.check(device, choice, num_candidates=10), of_all)


@pytest.mark.parametrize("at_once", [1 << 30, 1])
def test_a_cut_prompt_picks_what_a_whole_one_does(device, at_once, monkeypatch):
    monkeypatch.setattr(candidates, "_ENOUGH_TILES", at_once)
    monkeypatch.setattr(candidates, "_PART", 3)
    choice, geometry = Choice(4, 16, 1, 1), Geometry(20, 16, 8, 4)
    whole = Prompt("lowbit4", [70], [first(60, 60)], (1, 4, 16), geometry)
    want = whole.check(device, choice, num_candidates=6)
    for begin, end in ((0, 23), (23, 60)):
        part = Prompt("lowbit4", [70 + begin], [first(end - begin, end - begin)], (1, 4, 16),
                      geometry)  # fmt: skip
        part.k, part.query = whole.k[:, :, : 70 + end], whole.query[:, :, begin:end]
        assert torch.equal(part.check(device, choice, num_candidates=6), want[:, :, begin:end])


@pytest.mark.parametrize("repeat", [1, 2, 3, 7, 8, 16, 71])
def test_groups_of_every_size(device, repeat):
    groups = 1 if repeat > 16 else 2
    prompt = Prompt("lowbit2", [300], [first(2, 2)], (groups, repeat, 20), Geometry(20, 16, 8, 4))
    prompt.check(device, Choice(7, 16, 1, 1), num_candidates=11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_head_dims(device, dim, dtype):
    """Of 32 bits a block is longer than a tile, and is summed piece by piece."""
    geometry = Geometry(10, 64, 32, 16)
    prompt = Prompt("lowbit2", [600], [first(2, 2)], (1, 2, dim), geometry, dtype=dtype)
    prompt.check(device, Choice(4, 64, 1, 1), num_candidates=6)


@pytest.mark.parametrize("size", [16, 32, 48, 80, 128])
@pytest.mark.parametrize("selector", LOW_BIT)
def test_block_sizes(device, selector, size):
    geometry = Geometry(9, size, 16, 16)
    prompt = Prompt(
        selector, [9 * size - 2, 6 * size - 1], [first(2, 2)] * 2, (1, 3, 16), geometry,
        dtype=torch.float16,
    )  # fmt: skip
    prompt.check(device, Choice(4, size, 1, 1), num_candidates=5)


def test_ties_go_to_the_lower_block(device):
    """Keys that are all the same make every block's score the same, bit for bit."""
    geometry, choice = Geometry(32, 16, 8, 4), Choice(12, 16, 1, 2)
    prompt = Prompt("lowbit2", [500], [first(3, 3)], (1, 2, 16), geometry)
    prompt.k = torch.ones_like(prompt.k)
    ids = prompt.check(device, choice, num_candidates=16)
    assert ids[0, 0, 0].tolist() == [*range(9), 29, 30, 31]


@pytest.mark.parametrize(
    ("choice", "num_candidates"),
    [(Choice(1, 16, 0, 0), 2), (Choice(6, 16, 0, 0), 6), (Choice(4, 16, 3, 5), 11)],
)
def test_choices(device, choice, num_candidates):
    """None forced, no more candidates than are wanted, and more forced than wanted."""
    prompt = Prompt("lowbit2", [230, 7], [first(2, 2)] * 2, (1, 1, 16), Geometry(30, 16, 8, 4))
    ids = prompt.check(device, choice, num_candidates=num_candidates)
    assert (ids[0, 0] >= 0).sum(-1).tolist() == [choice.num_selected] * 2


def test_tiles_take_turns(device, monkeypatch):
    """Few tiles have their masses at once, and several programs walk the union of one."""
    for module in (selection_bytes, workspace):
        monkeypatch.setattr(module, "SCORE_BYTES", 40_000)
    monkeypatch.setattr(candidates, "_PART", 5)
    prompt = Prompt("lowbit2", [700], [first(43, 43)], (2, 4, 16), Geometry(50, 16, 8, 4))
    prompt.check(device, Choice(10, 16, 1, 2), num_candidates=16)


def test_leads_of_runs_have_the_blocks_of_all_their_tokens(device):
    """A column may stand for several positions, so that blocks lie further than columns say."""
    geometry, choice = Geometry(60, 16, 8, 4), Choice(6, 16, 1, 2)
    prompt = Prompt("lowbit4", [600], [first(200, 200)], (1, 2, 16), geometry)
    columns = torch.arange(0, 200, 8)
    whole = prompt.check(device, choice, num_candidates=9)
    asked = prompt.asked(device)
    asked = dataclasses.replace(
        asked, query=asked.query[:, :, columns], positions=asked.positions[:, columns].contiguous(),
        spread=8,
    )  # fmt: skip
    ids = torch.empty(1, 1, len(columns), 6, dtype=torch.int32, device=device)
    kernels.select_tokens(asked, choice, ids, 9)
    assert torch.equal(ids.cpu(), whole[:, :, columns])


def test_a_query_that_is_no_number_reads_the_lowest_blocks(device):
    prompt = Prompt("lowbit2", [400], [first(3, 3)], (1, 2, 16), Geometry(30, 16, 8, 4))
    prompt.query[:, :, 1] = float("nan")
    ids = prompt.check(device, Choice(5, 16, 1, 1), num_candidates=8)
    assert ids[0, 0, 1].tolist() == [0, 1, 2, 24, 25]


def test_gaps_between_a_query_s_elements(device):
    prompt = Prompt("lowbit2", [200], [first(2, 2)], (1, 2, 16), Geometry(14, 16, 8, 4))
    prompt.query = prompt.query.repeat_interleave(2, -1)[..., ::2]
    assert prompt.query.stride(-1) == 2
    prompt.check(device, Choice(5, 16, 1, 1), num_candidates=8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("repeat", "dim"), [(1, 64), (4, 96), (7, 128), (16, 128)])
def test_large_shapes(device, repeat, dim, dtype):
    geometry, lengths = Geometry(300, 64, 32, 16), [18000, 6000, 0]
    mask = [first(200, 200), [i >= 100 for i in range(200)], first(150, 200)]
    prompt = Prompt("lowbit2", lengths, mask, (2, repeat, dim), geometry, dtype=dtype)
    prompt.check(device, Choice(80, 64, 1, 32), 0.998, reference=device, num_candidates=128)
