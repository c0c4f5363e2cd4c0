from __future__ import annotations

import pytest
import torch
from low_bit_prompt import SCALE, Prompt
from picked import first

from sparda_compile.kernels import workspace
from sparda_compile.kernels.gpu import pick_tokens, token_masses
from sparda_compile.kernels.gpu import select_tokens as kernels
from sparda_compile.kernels.gpu.score_turns import Blocks
from sparda_compile.kernels.gpu.select import Choice
from sparda_compile.kernels.gpu.token_masses import massed_tokens
from sparda_compile.selectors import Geometry
from sparda_compile.selectors.lowbit import dequantize

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOW_BIT = ["lowbit2", "lowbit4", "lowbit2_forecast", "lowbit4_forecast"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selector", LOW_BIT)
def test_kernels_equal_the_reference(device, selector, dtype):
    """A turn behind a past of 60 blocks, with holes behind a short one, and left padding."""
    mask = [first(4, 4), [i != 1 for i in range(4)], [i > 2 for i in range(4)]]
    sizes, geometry = (1, 4, 24), Geometry(70, 16, 8, 4)
    prompt = Prompt(selector, [1000, 170, 90], mask, sizes, geometry, dtype=dtype)
    ids = prompt.check(device, Choice(9, 16, 1, 2))
    assert (ids >= 0).sum(-1).unique().tolist() == [0, 6, 9]


@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4_forecast"])
def test_new_tokens_fill_blocks_that_later_ones_score(device, selector):
    """A block has a score from the first token behind it on: 140 tokens fill several."""
    prompt = Prompt(selector, [170, 0], [first(140, 140)] * 2, (1, 2, 16), Geometry(20, 16, 8, 4))
    ids = prompt.check(device, Choice(5, 16, 1, 1))
    # Blocks from 10 on are of new tokens; the last token's own is 19, and 18 is local.
    picked = {block for row in ids[0, 0, -20:].tolist() for block in row}
    assert picked & set(range(10, 18))


@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4_forecast"])
def test_a_cut_prompt_picks_what_a_whole_one_does(device, selector):
    choice, geometry = Choice(4, 16, 1, 1), Geometry(20, 16, 8, 4)
    whole = Prompt(selector, [150], [first(60, 60)], (1, 2, 16), geometry)
    want = whole.check(device, choice)
    for begin, end in ((0, 23), (23, 60)):
        part = Prompt(selector, [150 + begin], [first(end - begin, end - begin)], (1, 2, 16),
                      geometry)  # fmt: skip
        part.k, part.query = whole.k[:, :, : 150 + end], whole.query[:, :, begin:end]
        assert torch.equal(part.check(device, choice), want[:, :, begin:end])


@pytest.mark.parametrize("repeat", [1, 3, 4, 7, 8, 16, 71])
def test_groups_of_every_size(device, repeat):
    groups = 1 if repeat > 64 else 2
    prompt = Prompt("lowbit2", [300], [first(2, 2)], (groups, repeat, 20), Geometry(20, 16, 8, 4))
    prompt.check(device, Choice(7, 16, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4_forecast"])
def test_head_dims(device, selector, dim, dtype):
    """Of 32 bits a block is longer than a tile, and is summed piece by piece."""
    geometry = Geometry(10, 64, 32, 16)
    prompt = Prompt(selector, [600], [first(2, 2)], (1, 2, dim), geometry, dtype=dtype)
    prompt.check(device, Choice(4, 64, 1, 1))


@pytest.mark.parametrize("size", [16, 32, 48, 80, 128])
@pytest.mark.parametrize("selector", LOW_BIT)
def test_block_sizes(device, selector, size):
    geometry = Geometry(9, size, 16, 16)
    prompt = Prompt(
        selector, [9 * size - 2, 6 * size - 1], [first(2, 2)] * 2, (1, 3, 16), geometry,
        dtype=torch.float16,
    )  # fmt: skip
    prompt.check(device, Choice(4, size, 1, 1))


@pytest.mark.parametrize("selector", LOW_BIT)
def test_ties_go_to_the_lower_block(device, selector):
    """Keys that are all the same make every block's score the same, bit for bit."""
    geometry, choice = Geometry(32, 16, 8, 4), Choice(12, 16, 1, 2)
    prompt = Prompt(selector, [500], [first(3, 3)], (1, 2, 16), geometry)
    prompt.k = torch.ones_like(prompt.k)
    ids = prompt.check(device, choice)
    assert ids[0, 0, 0].tolist() == [*range(9), 29, 30, 31]


@pytest.mark.parametrize("selector", ["lowbit2", "lowbit2_forecast"])
@pytest.mark.parametrize(
    "choice",
    [Choice(1, 16, 0, 0), Choice(6, 16, 0, 0), Choice(4, 16, 3, 5), Choice(40, 16, 1, 2)],
)
def test_choices(device, choice, selector):
    """One block, none of them forced, more forced than wanted, and more than there are."""
    prompt = Prompt(selector, [200, 7], [first(2, 2)] * 2, (1, 1, 16), Geometry(30, 16, 8, 4))
    ids = prompt.check(device, choice)
    assert (ids[0, 0] >= 0).sum(-1).tolist() == [min(choice.num_selected, 13)] * 2


@pytest.mark.parametrize("selector", ["lowbit4", "lowbit4_forecast"])
def test_a_prompt_from_its_first_token(device, selector):
    """Tokens with all blocks, with as many as they may have, and with more, in one tile."""
    mask = [[i > 1 for i in range(66)]]
    prompt = Prompt(selector, [0], mask, (1, 2, 16), Geometry(5, 16, 8, 4))
    ids = prompt.check(device, Choice(2, 16, 1, 0))
    assert (ids[0, 0] >= 0).sum(-1).tolist() == [0] * 2 + [1] * 16 + [2] * 48


@pytest.mark.parametrize("score_bytes", [1, 40_000])
@pytest.mark.parametrize(("selector", "num_tokens"), [("lowbit2_forecast", 33), ("lowbit2", 9)])
def test_parts_tiles_and_chunks(device, selector, num_tokens, score_bytes, monkeypatch):
    """Several programs share the blocks, not in whole tiles; few tokens are taken at a time."""
    for module in (token_masses, workspace):
        monkeypatch.setattr(module, "MASS_PART_BLOCKS", 15)
    monkeypatch.setattr(workspace, "SCORE_COLUMNS", 16)
    monkeypatch.setattr(workspace, "SCORE_BYTES", score_bytes)
    mask, geometry = [first(num_tokens, num_tokens)], Geometry(50, 16, 8, 4)
    prompt = Prompt(selector, [700], mask, (1, 4, 16), geometry)
    prompt.check(device, Choice(10, 16, 1, 2))


@pytest.mark.parametrize("selector", LOW_BIT)
def test_gaps_between_a_query_s_elements(device, selector):
    prompt = Prompt(selector, [200], [first(2, 2)], (1, 2, 16), Geometry(14, 16, 8, 4))
    prompt.query = prompt.query.repeat_interleave(2, -1)[..., ::2]
    assert prompt.query.stride(-1) == 2
    prompt.check(device, Choice(5, 16, 1, 1))


@pytest.mark.parametrize("selector", LOW_BIT)
def test_many_blocks_are_picked_by_runs(device, selector, monkeypatch):
    counts = []

    def counted(scores, blocks, selected):
        found = by_runs(scores, blocks, selected)
        counts.append(found[1])
        return found

    by_runs = pick_tokens._by_runs
    monkeypatch.setattr(pick_tokens, "_by_runs", counted)
    mask, geometry = [first(9, 9), first(5, 9)], Geometry(150, 16, 8, 4)
    prompt = Prompt(selector, [2200, 1800], mask, (2, 4, 16), geometry)
    prompt.check(device, Choice(4, 16, 1, 1))
    assert counts
    assert all(count == 24 for count in counts)


def test_what_is_not_covered():
    query, geometry = torch.empty(1, 258, 1, 8), Geometry(4, 16, 24, 4)
    assert kernels.covers("lowbit2", query, 3, geometry)
    assert not kernels.covers("lowbit2", query, 2, geometry)
    assert not kernels.covers("lowbit2", query, 3, Geometry(1 << 16, 16, 24, 4))
    assert not kernels.covers("lowbit3", query, 3, geometry)


def truth(prompt, row, token):
    """Return each block's score in double precision, -inf where it is not full."""
    codes, span, base, _ = (tensor[row] for tensor in prompt.summary())
    full = int(prompt.position[row, token]) // prompt.geometry.block_size
    keys = dequantize(codes, span, base, prompt.rule.bits)[:, :full].double()
    query = prompt.query[row, :, token].double().unflatten(0, (keys.shape[0], -1))
    logits = torch.einsum("grd,gnpd->grnp", query, keys) * SCALE
    if prompt.rule.settles:
        return logits[:, 0].logsumexp(-1)
    return logits.flatten(-2).softmax(-1).view_as(logits).sum((1, 3))


def in_order(scores):
    """Return scores as blocks follow one another; in memory each fourth one does."""
    return scores.unflatten(-1, (-1, 4, 64)).transpose(-1, -2).flatten(-3)


def by_token(it, blocks):
    """Return scores [B, G, T, n] of all tokens."""
    parts = [in_order(scores.blocks[:, : end - begin])
             for begin, end, scores in massed_tokens(it, blocks, 0)]  # fmt: skip
    return torch.cat(parts, 1).unflatten(0, (-1, it.num_groups)).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("selector", LOW_BIT)
def test_scores_are_shares_of_attention_or_logarithms_of_sums(device, selector, size, dtype):
    geometry = Geometry(30, size, 8, 4)
    prompt = Prompt(selector, [290, 37], [first(9, 9)] * 2, (2, 3, 16), geometry, dtype=dtype)
    got = by_token(prompt.asked(device), Blocks.ALL)
    for row in range(2):
        for token in range(9):
            want = truth(prompt, row, token)
            found = got[row, :, token, : want.shape[1]].double()
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(300, 37), (304, 32), (33, 5), (7, 0)])
@pytest.mark.parametrize("selector", ["lowbit2_forecast", "lowbit4_forecast"])
def test_two_parts_are_the_whole_bit_for_bit(device, selector, lengths):
    prompt = Prompt(selector, lengths, [first(40, 40)] * 2, (2, 1, 16), Geometry(30, 16, 8, 4))
    whole, new = (by_token(prompt.asked(device), blocks) for blocks in (Blocks.ALL, Blocks.NEW))
    past = by_token(prompt.asked(device, prompt.summary(prompt.lengths)), Blocks.PAST)
    for row, length in enumerate(lengths):
        settled = length // 16
        assert torch.equal(past[row][..., :settled], whole[row][..., :settled])
        origin = max(settled - 1, 0)
        for token in range(40):
            count = (length + token) // 16
            want = whole[row, :, token, origin:count]
            assert torch.equal(new[row, :, token, : count - origin], want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("repeat", "dim"), [(1, 64), (4, 96), (7, 128), (8, 64), (16, 256)])
@pytest.mark.parametrize("selector", LOW_BIT)
def test_large_shapes(device, selector, repeat, dim, dtype):
    geometry, lengths = Geometry(300, 64, 32, 16), [18000, 6000, 0]
    mask = [first(200, 200), [i >= 100 for i in range(200)], first(150, 200)]
    prompt = Prompt(selector, lengths, mask, (2, repeat, dim), geometry, dtype=dtype)
    prompt.check(device, Choice(96, 64, 1, 32), 0.999, reference=device)
