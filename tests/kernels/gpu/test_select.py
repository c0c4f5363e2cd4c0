"""Selection and planning move ids: bit-equal to the reference, outputs and tables, at each step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.kernels.gpu.select import Choice, Planned, Tables, plan, select, select_and_plan
from sparda_compile.kernels.select_blocks import select_blocks_reference
from sparda_compile.runtime.block_table import plan_pages

SIZE = 16
UNWRITTEN = -77
INF, NAN = float("inf"), float("nan")


def check_select(device, scores, lengths, choice):
    """Compare with the reference; return the ids."""
    lengths = torch.tensor(lengths, dtype=torch.int32)
    want = select_blocks_reference(scores, lengths, *choice)
    got = torch.full(want.shape, UNWRITTEN, dtype=torch.int32, device=device)
    select(scores.to(device), lengths.to(device), got, choice)
    assert torch.equal(got.cpu(), want)
    return want


@st.composite
def selections(draw):
    """Few values, so there are many ties; both zeros, infinities, NaN and the ends of fp32."""
    num_blocks = draw(st.sampled_from([1, 2, 3, 8, 21, 32]))
    values = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, INF, -INF, 3.4028234663852886e38, -1e30, 1e30]
    values += [NAN, -NAN]
    few = draw(st.lists(st.sampled_from(values), min_size=1, max_size=4))
    seed = draw(st.integers(0, 1 << 16))
    # Each number is a kernel of its own on a GPU.
    num_selected = min(num_blocks, draw(st.sampled_from([1, 2, 5, 20])))
    choice = Choice(num_selected, SIZE, draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    return num_blocks, few, seed, choice


@settings(max_examples=40)
@given(selections())
def test_select_equals_the_reference(device, selection):
    num_blocks, few, seed, choice = selection
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(0, len(few), (2, 1, num_blocks), generator=generator)
    lengths = torch.randint(0, num_blocks * SIZE, (2,), generator=generator).tolist()
    check_select(device, torch.tensor(few)[pick], lengths, choice)


@pytest.mark.parametrize("value", [0.0, -0.0, -INF, INF, -3e38, 1e-45, NAN])
@pytest.mark.parametrize("num_selected", [1, 6, 37])
def test_ties_go_to_the_lower_id(device, value, num_selected):
    scores = torch.full((1, 1, 37), value)
    ids = check_select(device, scores, [36 * SIZE], Choice(num_selected, SIZE, 1, 1))
    if num_selected == 6 and value != INF:
        assert ids.tolist() == [[[0, 1, 2, 3, 35, 36]]]


def test_zeros_of_both_signs_are_equal(device):
    scores = torch.tensor([-0.0, 0.0, -0.0, 0.0, -1e-45, 1e-45, -0.0, 0.0]).expand(2, 3, 8)
    scores = scores.contiguous()
    ids = check_select(device, scores, [127, 112], Choice(5, SIZE, 0, 0))
    assert ids[0, 0].tolist() == [0, 1, 2, 5, 7]


def test_unscored_blocks_come_after_all_scored_ones(device):
    lowest = torch.finfo(torch.float32).min
    scores = torch.tensor([[[-INF, -INF, lowest, -1e38, -INF, 5.0, -INF, 0.0]]])
    for num_selected in range(1, 9):
        check_select(device, scores, [127], Choice(num_selected, SIZE, 0, 0))


def test_forced_blocks_beat_infinite_scores(device):
    scores = torch.full((1, 1, 12), -INF)
    scores[..., 4:8] = INF
    ids = check_select(device, scores, [11 * SIZE + 5], Choice(5, SIZE, 1, 1))
    # Scores of +inf tie with the forced blocks and go by id, as in the reference.
    assert ids.tolist() == [[[0, 4, 5, 6, 7]]]


@pytest.mark.parametrize("lengths", [[0, 1], [15, 16], [17, 47], [95, 80]])
def test_fewer_blocks_than_wanted_leave_minus_one(device, lengths):
    ids = check_select(device, torch.randn(2, 2, 6), lengths, Choice(5, SIZE, 1, 1))
    assert ids.ge(0).sum(-1)[:, 0].tolist() == [min(n // SIZE + 1, 5) for n in lengths]


@pytest.mark.parametrize(("sink", "local"), [(0, 0), (1, 2), (7, 40), (40, 0)])
@pytest.mark.parametrize("num_selected", [1, 17])
def test_random_scores(device, num_selected, sink, local):
    choice = Choice(num_selected, SIZE, sink, local)
    check_select(device, torch.randn(3, 2, 37), [36 * SIZE, 20 * SIZE + 7, 3], choice)


LONG = {
    "around zero": lambda s: s,
    "ties": lambda s: (s * 2).round(),
    "weights": lambda s: s.exp() * 1e-20,
    "a third without": lambda s: s.index_fill(-1, torch.arange(0, s.shape[-1], 3), -INF),
    "negative": lambda s: -s.abs() - 3,
    "ascending": lambda s: s.sort(-1).values,
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("local", [2, 30, 95])
def test_many_blocks_for_each_one_wanted(device, kind, local):
    # At 1536 = 96 * 16 blocks and more, every run of 16 has a best one.
    last = [2047, 1535, 1534, 1000, 96, 95, 94, 0]
    scores = LONG[kind](torch.randn(len(last), 2, 2048))
    check_select(device, scores, [n * SIZE + 3 for n in last], Choice(96, SIZE, 1, local))


class Twins:
    """The same tables twice, one planned by the reference and one by the kernel."""

    def __init__(self, device, batch, groups, num_blocks, num_pages):
        self.device = device
        self.want = Tables(
            torch.full((batch, groups, num_blocks), -1, dtype=torch.int32),
            torch.full((batch, groups, num_pages), -1, dtype=torch.int32),
            torch.full((batch, groups, num_pages), -1, dtype=torch.int32),
            torch.zeros(5, dtype=torch.int64),
        )
        self.got = Tables(*(table.clone().to(device) for table in self.want))

    def check(self, ids, lengths, size, eviction, *, is_hint=False, scores=None, choice=None):
        """Plan with both. Given scores, the kernel selects too, in the same launch."""
        want = Planned(*plan_pages(ids, lengths, *self.want, size, eviction, is_hint))
        got = Planned(*(torch.full_like(t.int(), UNWRITTEN, device=self.device) for t in want))
        got = got._replace(is_miss=torch.ones_like(ids, dtype=torch.bool, device=self.device))
        got.is_miss.view(torch.int8).fill_(UNWRITTEN)
        length = lengths.to(self.device)
        if scores is None:
            given = ids.to(self.device)
            plan(given, length, self.got, got, size, eviction, is_hint=is_hint)
        else:
            given = torch.full_like(ids, UNWRITTEN, device=self.device)
            select_and_plan(
                scores.to(self.device), length, given, self.got, got, choice, eviction,
                is_hint=is_hint,
            )  # fmt: skip
        assert torch.equal(given.cpu(), ids)
        assert torch.equal(got.is_miss.view(torch.int8).cpu(), want.is_miss.view(torch.int8))
        for name in ("page_ids", "miss_blocks", "miss_pages", "tail_page"):
            assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
        for name in Tables._fields:
            assert torch.equal(getattr(self.got, name).cpu(), getattr(self.want, name)), name
        return want


def drift(scores):
    """Return the scores of a step later: most stay, some change, a few tie."""
    new = torch.where(torch.rand_like(scores) < 0.15, torch.randn_like(scores), scores)
    return torch.where(torch.rand_like(scores) < 0.05, torch.zeros_like(scores), new)


def run_steps(device, lengths, groups, sizes, choice, eviction, num_steps, *, hint_every=3):
    """Decode step by step, selecting in the same launch in every second one.

    A hint that is a step old and partly wrong is planned before every `hint_every`-th step.

    Returns:
        The counters.
    """
    num_blocks, num_pages = sizes
    twins = Twins(device, len(lengths), groups, num_blocks, num_pages)
    length = torch.tensor(lengths, dtype=torch.int32)
    scores = torch.randn(len(lengths), groups, num_blocks)
    hint = None
    for step in range(num_steps):
        if step % hint_every == 1:
            twins.check(hint, length, choice.block_size, eviction, is_hint=True)
        ids = select_blocks_reference(scores, length, *choice)
        fused = scores if step % 2 else None
        twins.check(ids, length, choice.block_size, eviction, scores=fused, choice=choice)
        scores = drift(scores)
        hint = select_blocks_reference(drift(scores), length, *choice)
        length += 1 + step % 3 if num_pages < num_blocks else 1
        length.clamp_(max=num_blocks * choice.block_size - 1)
    return twins.want.counters.tolist()


@pytest.mark.parametrize("eviction", ["lru", "fifo"])
def test_steps_equal_the_reference(device, eviction):
    """Tables begin empty, with sequences of different lengths, and pages become scarce."""
    choice = Choice(6, 4, 1, 1)
    counters = run_steps(device, [1, 30], 1, (30, 8), choice, eviction, 61)
    assert all(counters[:4])


def test_groups_are_planned_apart(device):
    run_steps(device, [0, 50, 9], 3, (20, 7), Choice(5, 4, 1, 0), "lru", 6)


@pytest.mark.parametrize(
    ("num_selected", "num_pages", "eviction"), [(1, 2, "lru"), (5, 6, "fifo"), (11, 13, "lru")]
)
def test_as_few_pages_as_can_be(device, num_selected, num_pages, eviction):
    choice = Choice(num_selected, 4, 0, 0)
    run_steps(device, [40, 3], 1, (14, num_pages), choice, eviction, 10)


@pytest.mark.parametrize("eviction", ["lru", "fifo"])
def test_resident_cache_equals_the_reference(device, eviction):
    """With a page for every block each new block comes in turn, and nothing is ever fetched."""
    choice = Choice(5, 1, 1, 1)
    counters = run_steps(device, [0], 2, (11, 11), choice, eviction, 11)
    assert counters[0]
    assert counters[1:] == [0, 0, 0, 0]


def test_all_hits_and_all_misses(device):
    """Without the current block, as a hint is: no tail page, and every id or none is fetched."""
    twins = Twins(device, 2, 2, 20, 7)
    lengths = torch.tensor([19 * SIZE + 3, 19 * SIZE], dtype=torch.int32)
    first = torch.arange(6, dtype=torch.int32).expand(2, 2, 6).contiguous()
    for ids, num_misses in ((first, 6), (first, 0), (first + 6, 6), (first + 3, 2)):
        planned = twins.check(ids, lengths, SIZE, "lru")
        assert planned.is_miss.sum(-1).eq(num_misses).all()
        assert planned.tail_page.eq(-1).all()


def test_no_ids_change_nothing(device):
    twins = Twins(device, 1, 2, 8, 4)
    ids = torch.tensor([[[0, 2, -1], [1, 2, 3]]], dtype=torch.int32)
    lengths = torch.tensor([60], dtype=torch.int32)
    twins.check(ids, lengths, SIZE, "lru")
    before = [table.clone() for table in twins.got]
    twins.check(torch.full_like(ids, -1), lengths + 1, SIZE, "lru")
    assert all(map(torch.equal, before, twins.got))


@pytest.mark.parametrize("eviction", ["lru", "fifo"])
def test_hint_does_not_push_out_the_block_being_written(device, eviction):
    twins = Twins(device, 1, 1, 8, 4)
    step = torch.tensor([4 * SIZE + 2], dtype=torch.int32)
    twins.check(torch.tensor([[[4, -1, -1]]], dtype=torch.int32), step - 2, SIZE, eviction)
    twins.check(torch.tensor([[[0, 1, 2]]], dtype=torch.int32), step - 1, SIZE, eviction)
    hint = torch.tensor([[[0, 1, 3]]], dtype=torch.int32)
    twins.check(hint, step, SIZE, eviction, is_hint=True)
    assert twins.want.page_block.tolist() == [[[4, 0, 1, 3]]]
    assert twins.want.counters.tolist() == [1, 3, 1, 3, 0]


@pytest.mark.parametrize("eviction", ["lru", "fifo"])
def test_stores_between_barriers_may_come_in_any_order(device, late_stores, eviction):
    """With some blocks absent, all of them and none, and with a page for every block."""
    twins = Twins(device, 1, 2, 20, 9)
    choice = Choice(7, SIZE, 1, 2)
    scores = torch.randn(1, 2, 20)
    for length in range(12 * SIZE, 12 * SIZE + 3):
        lengths = torch.tensor([length], dtype=torch.int32)
        ids = select_blocks_reference(scores, lengths, *choice)
        twins.check(ids, lengths, SIZE, eviction, is_hint=True)
        planned = twins.check(ids, lengths, SIZE, eviction, scores=scores, choice=choice)
        assert not planned.is_miss.any()
        assert planned.tail_page.ge(0).all()
        scores = drift(scores)
    run_steps(device, [0], 1, (11, 11), Choice(5, 1, 1, 1), eviction, 11)


@pytest.mark.gpu
@pytest.mark.parametrize("num_selected", [1, 33, 96, 150])
@pytest.mark.parametrize("num_blocks", [300, 1024, 2048])
def test_large_selections(device, num_blocks, num_selected):
    scores = torch.randn(9, 8, num_blocks)
    scores[:3] = scores[:3].round()
    scores[3, :, ::2] = -INF
    scores[4] = -INF
    lengths = [num_blocks * SIZE - 1, 0, 1, 100 * SIZE, 37, *torch.randint(0, 4000, (4,)).tolist()]
    for sink, local in ((1, 32), (0, 0)):
        check_select(device, scores, lengths, Choice(num_selected, SIZE, sink, local))


@pytest.mark.gpu
@pytest.mark.parametrize("eviction", ["lru", "fifo"])
@pytest.mark.parametrize(("num_blocks", "size"), [(300, 16), (1024, 32), (2048, 64)])
def test_large_caches(device, num_blocks, size, eviction):
    """96 blocks in 1.5 times as many pages; the reference's constants."""
    lengths = [0, size - 1, 90 * size, 299 * size, num_blocks * size - 150]
    choice = Choice(96, size, 1, 32)
    counters = run_steps(device, lengths, 8, (num_blocks, 144), choice, eviction, 100)
    assert all(counters[:4])


@pytest.mark.gpu
def test_large_resident_cache(device):
    choice = Choice(96, 1, 1, 32)
    counters = run_steps(device, [0, 0], 4, (300, 300), choice, "lru", 300)
    assert counters[1:] == [0, 0, 0, 0]


def test_more_blocks_than_can_be_counted(device):
    scores = torch.zeros(1, 1, (1 << 15) + 1, device=device)
    lengths = torch.zeros(1, dtype=torch.int32, device=device)
    ids = torch.zeros(1, 1, 4, dtype=torch.int32, device=device)
    with pytest.raises(UnsupportedInputError, match="32769 KV blocks is too long"):
        select(scores, lengths, ids, Choice(4, SIZE, 1, 1))
