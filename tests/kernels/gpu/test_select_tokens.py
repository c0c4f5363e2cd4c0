from __future__ import annotations

import dataclasses

import pytest
import torch
from picked import check_picks, first

from sparda_compile.kernels import workspace
from sparda_compile.kernels.gpu import pick_tokens, token_scores
from sparda_compile.kernels.gpu import select_tokens as kernels
from sparda_compile.kernels.gpu.select import Choice
from sparda_compile.kernels.prefill_attention import token_positions
from sparda_compile.kernels.select_tokens import select_tokens
from sparda_compile.kernels.shared_sets import leads_of
from sparda_compile.selectors import Geometry

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SELECTORS = ["forecast", "infllm2", "quest", "nosa", "nosa_forecast"]
SCALE = 0.3


class Prompt:
    """New tokens behind `lengths` others, some of them hidden, and the pooled keys of all."""

    def __init__(self, lengths, mask, sizes, geometry, *, dtype=torch.float32, whole=None, seed=0):
        groups, repeat, dim = sizes
        self.generator = torch.Generator().manual_seed(seed)
        self.whole, self.dtype, self.geometry = whole, dtype, geometry
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.mask = torch.tensor(mask)
        batch, num_tokens = self.mask.shape
        self.pooled = self.numbers(batch, groups, geometry.num_windows, dim)
        totals = self.lengths + self.mask.sum(1)
        for row, total in enumerate(totals.tolist()):
            assert total <= geometry.num_blocks * geometry.block_size
            complete = max((total - geometry.pool_size) // geometry.pool_stride + 1, 0)
            self.pooled[row, :, complete:] = float("nan")
        self.bounds = self.numbers(batch, groups, geometry.num_blocks, 2, dim).sort(-2).values
        for row, total in enumerate(totals.tolist()):
            filled = -(-total // geometry.block_size)
            self.bounds[row, :, filled:, 0] = float("inf")
            self.bounds[row, :, filled:, 1] = float("-inf")
        self.queries = self.numbers(batch, num_tokens, groups * repeat, dim).transpose(1, 2)
        self.forecasts = self.numbers(batch, num_tokens, groups, dim).transpose(1, 2)

    def numbers(self, *shape):
        """Return noise, or whole numbers, whose products are exact and often equal."""
        if self.whole:
            low, high = -self.whole, self.whole + 1
            return torch.randint(low, high, shape, generator=self.generator).to(self.dtype)
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def check(self, device, selector, choice, least_equal=1.0, leads=None):
        """Compare with the reference, which is given the same numbers in fp32; return the ids.

        Fewer than all blocks may be equal where sums in another order decide what is nearly a tie.
        """
        geometry, num_past = self.geometry, int(self.lengths.max())
        if selector.startswith("nosa"):
            forced = (choice.sink_blocks, choice.local_blocks)
            listed = max(choice.num_selected - sum(forced) - 1, 0) // 2
            geometry = dataclasses.replace(
                geometry, short_list=listed, sink_blocks=forced[0], local_blocks=forced[1]
            )
        query = self.forecasts if selector.endswith("forecast") else self.queries
        summary = self.bounds if selector == "quest" else self.pooled
        # What the reference reads of windows that no token has completed is hidden behind it.
        exact = summary.float() if selector == "quest" else summary.float().nan_to_num()
        position = token_positions(self.lengths, self.mask, self.mask.shape[1]).int()
        mask, spread = self.mask, 1
        if leads is not None:
            position, mask, spread = leads.positions, leads.positions >= 0, 8
        want = select_tokens(
            query.float(), [exact], position, self.lengths, num_past, selector, SCALE,
            geometry.num_blocks, geometry.block_size, geometry.pool_size, geometry.pool_stride,
            *self.ordered(choice), geometry.short_list,
        )  # fmt: skip
        assert kernels.covers(selector, query, self.pooled.shape[1], geometry)
        asked = kernels.Asked(
            query.to(device), [summary.to(device)], position.to(device), self.lengths.to(device),
            num_past, selector, SCALE, geometry, spread,
        )  # fmt: skip
        got = torch.empty_like(want, device=device)
        kernels.select_tokens(asked, choice, got)
        self.check_in_two_parts(asked, choice, got)
        got = got.cpu()
        assert got.dtype == torch.int32
        check_picks(got, want, mask, least_equal)
        return got

    def check_in_two_parts(self, asked, choice, want):
        """What is picked of the past first, by its own windows, changes no bit of the choice."""
        open_blocks = self.geometry.num_open_blocks
        settles = asked.selector in ("forecast", "quest")
        if not settles or choice.local_blocks < open_blocks:
            return
        scores = torch.empty(want.shape, device=want.device)
        near, ids = torch.empty_like(want), torch.empty_like(want)
        kernels.select_past(self.of_the_past(asked), choice, near, scores)
        kernels.select_near(asked, choice, (near, scores), ids)
        assert torch.equal(ids, want)
        first = (asked.lengths // choice.block_size)[:, None, None, None]
        assert (near <= first).all()
        is_past = (want >= 0) & (want < first)
        assert ((want[..., None] == near[..., None, :]).any(-1) | ~is_past).all()

    def of_the_past(self, asked):
        """Return what is asked before the summary has the new keys: NaN where they will be."""
        summary = asked.tensors[0].clone()
        for row, length in enumerate(self.lengths.tolist()):
            if asked.selector == "quest":
                filled = -(-length // self.geometry.block_size)
                summary[row, :, filled:] = float("nan")
                continue
            pool, stride = self.geometry.pool_size, self.geometry.pool_stride
            summary[row, :, max((length - pool) // stride + 1, 0) :] = float("nan")
        return dataclasses.replace(asked, tensors=[summary])

    @staticmethod
    def ordered(choice):
        return choice.num_selected, choice.sink_blocks, choice.local_blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selector", SELECTORS)
def test_kernels_equal_the_reference(device, selector, dtype):
    """A turn behind a past of 60 blocks, with holes behind a short one, and left padding."""
    mask = [first(4, 4), [i != 1 for i in range(4)], [i > 2 for i in range(4)]]
    prompt = Prompt([1000, 170, 90], mask, (1, 4, 24), Geometry(70, 16, 8, 4), dtype=dtype)
    ids = prompt.check(device, selector, Choice(9, 16, 1, 2))
    assert (ids >= 0).sum(-1).unique().tolist() == [0, 6, 9]


@pytest.mark.parametrize("selector", SELECTORS)
def test_runs_of_tokens_share_what_their_first_one_picks(device, selector):
    """Leads of a call are asked alone; they may have the blocks of all its tokens."""
    prompt = Prompt([1000], [first(40, 40)], (1, 2, 16), Geometry(70, 16, 8, 4))
    position = token_positions(prompt.lengths, prompt.mask, 40).int()
    leads = leads_of(position, prompt.lengths, 8)
    for name in ("queries", "forecasts"):
        setattr(prompt, name, leads.of(getattr(prompt, name)))
    assert leads.positions[0].tolist() == [1000, 1008, 1016, 1024, 1032, -1]
    prompt.check(device, selector, Choice(9, 16, 1, 2), leads=leads)


@pytest.mark.parametrize("repeat", [1, 3, 4, 7, 8, 16, 71])
def test_groups_of_every_size(device, repeat):
    prompt = Prompt(
        [300], [first(2, 2)], (1 if repeat > 64 else 2, repeat, 20), Geometry(20, 16, 8, 4)
    )
    prompt.check(device, "infllm2", Choice(7, 16, 1, 1))


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("selector", SELECTORS)
def test_head_dims(device, selector, dim):
    prompt = Prompt([600], [first(2, 2)], (1, 2, dim), Geometry(10, 64, 32, 16))
    prompt.check(device, selector, Choice(4, 64, 1, 1))


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(33, 16, 16, 16),
        Geometry(21, 12, 6, 3),
        Geometry(27, 8, 12, 4),
        Geometry(40, 8, 4, 4),
    ],
)
@pytest.mark.parametrize("selector", SELECTORS)
def test_geometries(device, selector, geometry):
    """Windows side by side, sizes that are no power of two, windows over two blocks and of one."""
    size = geometry.block_size
    lengths = [geometry.num_blocks * size - 2, 5 * size - 1]
    prompt = Prompt(lengths, [first(2, 2)] * 2, (1, 3, 16), geometry)
    prompt.check(device, selector, Choice(5, size, 1, 1))


@pytest.mark.parametrize("selector", SELECTORS)
def test_ties_go_to_the_lower_block(device, selector):
    """Few different numbers, so that many blocks score the same, bit for bit."""
    geometry, choice = Geometry(64, 8, 4, 4), Choice(12, 8, 1, 2)
    prompt = Prompt([500], [first(3, 3)], (1, 2, 2), geometry, whole=1)
    ids = prompt.check(device, selector, choice)
    prompt.pooled, prompt.bounds = prompt.pooled.nan_to_num().zero_(), prompt.bounds.clamp(0, 0)
    same = prompt.check(device, selector, choice)
    assert same[0, 0, 0].tolist() == [*range(9), 60, 61, 62]
    assert not torch.equal(ids, same)


@pytest.mark.parametrize(
    "choice",
    [
        Choice(1, 8, 0, 0),
        Choice(6, 8, 0, 0),
        Choice(4, 8, 1, 2),
        Choice(4, 8, 3, 5),
        Choice(40, 8, 1, 2),
    ],
)
def test_choices(device, choice):
    """One block, none of them forced, all, more forced than wanted, and more than there are."""
    prompt = Prompt([120, 7], [first(2, 2)] * 2, (1, 1, 16), Geometry(30, 8, 4, 2))
    ids = prompt.check(device, "forecast", choice)
    assert (ids[0, 0] >= 0).sum(-1).tolist() == [min(choice.num_selected, 16)] * 2


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_prompt_from_its_first_token(device, selector):
    """Tokens with all blocks, with as many as they may have, and with more, in one tile."""
    prompt = Prompt([0], [[i > 1 for i in range(18)]], (1, 2, 16), Geometry(5, 4, 2, 2))
    ids = prompt.check(device, selector, Choice(3, 4, 1, 0))
    assert (ids[0, 0] >= 0).sum(-1).tolist() == [0] * 2 + [1] * 4 + [2] * 4 + [3] * 8


@pytest.mark.parametrize("score_bytes", [1, 40_000])
@pytest.mark.parametrize(("selector", "num_tokens"), [("forecast", 17), ("infllm2", 9)])
def test_parts_tiles_and_chunks(device, selector, num_tokens, score_bytes, monkeypatch):
    """Several programs share the windows, not in whole tiles; few tokens are taken at a time."""
    for module in (token_scores, workspace):
        monkeypatch.setattr(module, "PART_BLOCKS", 30)
    monkeypatch.setattr(token_scores, "_WINDOWS", 16)
    monkeypatch.setattr(workspace, "SCORE_COLUMNS", 16)
    monkeypatch.setattr(workspace, "SCORE_BYTES", score_bytes)
    prompt = Prompt([1500], [first(num_tokens, num_tokens)], (1, 4, 16), Geometry(100, 16, 8, 4))
    prompt.check(device, selector, Choice(10, 16, 1, 2))


@pytest.mark.parametrize("selector", SELECTORS)
def test_gaps_between_a_query_s_elements(device, selector):
    prompt = Prompt([200], [first(2, 2)], (1, 2, 16), Geometry(14, 16, 8, 4))
    for name in ("queries", "forecasts"):
        tensor = getattr(prompt, name).repeat_interleave(2, -1)[..., ::2]
        assert tensor.stride(-1) == 2
        setattr(prompt, name, tensor)
    prompt.check(device, selector, Choice(5, 16, 1, 1))


def test_what_is_not_covered():
    query, forecast = torch.empty(1, 258, 1, 8), torch.empty(1, 2, 1, 8)
    plain = Geometry(4, 16, 8, 4)
    assert kernels.covers("infllm2", query, 3, plain)
    assert not kernels.covers("infllm2", query, 2, plain)
    assert kernels.covers("forecast", forecast, 2, Geometry(4, 16, 20, 4))
    assert not kernels.covers("forecast", forecast, 2, Geometry(4, 16, 24, 4))
    assert not kernels.covers("forecast", forecast, 2, Geometry(1 << 16, 16, 8, 4))
    assert kernels.covers("quest", query, 2, Geometry(4, 16, 24, 4))
    for name in ("nosa", "nosa_forecast"):
        assert not kernels.covers(name, query, 2, plain)


@pytest.mark.parametrize("whole", [None, 1])
@pytest.mark.parametrize("selector", SELECTORS)
def test_many_blocks_are_picked_by_runs(device, selector, whole, monkeypatch):
    """Of noise, and of equal scores; what has a short list picks of all blocks."""
    counts = []

    def counted(scores, blocks, selected):
        found = by_runs(scores, blocks, selected)
        counts.append(found[1])
        return found

    by_runs = pick_tokens._by_runs
    monkeypatch.setattr(pick_tokens, "_by_runs", counted)
    prompt = Prompt(
        [1100, 900], [first(9, 9), first(5, 9)], (2, 4, 16), Geometry(150, 8, 4, 2), whole=whole
    )
    exact = selector in ("forecast", "quest") or whole is None
    prompt.check(device, selector, Choice(4, 8, 1, 1), 1.0 if exact else 0.9)
    lists = selector.startswith("nosa")
    assert counts
    # 18 runs, in rows with room for whole eights.
    assert all(count == (0 if lists else 24) for count in counts)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("selector", ["forecast", "infllm2", "quest"])
def test_many_blocks_of_large_shapes(device, selector, dtype):
    geometry = Geometry(5000, 64, 32, 16)
    mask = [first(130, 130), [i >= 30 for i in range(130)]]
    whole = 2 if selector == "infllm2" else 40
    prompt = Prompt([318000, 150000], mask, (2, 8, 128), geometry, dtype=dtype, whole=whole)
    prompt.check(device, selector, Choice(96, 64, 1, 32), 0.999 if selector == "infllm2" else 1.0)


# Whole numbers have exact products on tensor cores, too; a softmax has none, nor a mean of seven.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("repeat", "dim"), [(1, 64), (4, 96), (7, 128), (8, 64), (16, 256)])
@pytest.mark.parametrize("selector", SELECTORS)
def test_large_shapes(device, selector, repeat, dim, dtype):
    geometry = Geometry(300, 64, 32, 16)
    lengths = [18000, 6000, 0]
    mask = [first(700, 700), [i >= 300 for i in range(700)], first(650, 700)]
    whole = 2 if selector in ("infllm2", "nosa") else 40
    prompt = Prompt(lengths, mask, (2, repeat, dim), geometry, dtype=dtype, whole=whole)
    least = 0.998 if selector == "nosa" else 0.999  # it picks twice
    exact = selector == "forecast" or (selector == "quest" and repeat != 7)
    prompt.check(device, selector, Choice(96, 64, 1, 32), 1.0 if exact else least)
