"""Each token of a prompt picks what `score_blocks` and `select_blocks` pick at its position."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import ops
from sparda_compile.isa.engines import DeferredEngine, current_engine, use_engine
from sparda_compile.isa.streams import SELECT
from sparda_compile.kernels import select_tokens as room
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.selectors import SELECTORS, Geometry

assert ops.OPS
SIZE, BLOCKS, HEADS, GROUPS, DIM = 16, 12, 4, 2, 8
GEOMETRY = Geometry(BLOCKS, SIZE, 8, 4, 2, 1, 1)
CHOICE = (4, 1, 1)  # K, sink, local


def case(selector, lengths, mask):
    """Return a query for each token, and a summary that has the keys of all of them."""
    generator = torch.Generator().manual_seed(7)
    batch, num_tokens = mask.shape
    summary = SELECTORS[selector].summary
    tensors = [
        torch.empty(batch, GROUPS, *shape, dtype=summary.dtypes.get(name))
        for name, shape in summary.shapes(GEOMETRY, DIM).items()
    ]
    summary.reset(tensors)
    past = torch.zeros(batch, dtype=torch.int32)
    most = int(lengths.max())
    if most:
        k = torch.randn(batch, GROUPS, most, DIM, generator=generator)
        summary.extend(tensors, k, past, torch.arange(most) < lengths[:, None], GEOMETRY)
    k = torch.randn(batch, GROUPS, num_tokens, DIM, generator=generator)
    summary.extend(tensors, k, lengths, mask, GEOMETRY)
    heads = GROUPS if "forecast" in selector else HEADS
    return torch.randn(batch, heads, num_tokens, DIM, generator=generator), tensors


def select(selector, query, tensors, mask, lengths):
    return room.select_tokens(
        query, tensors, number_tokens(mask, lengths)[0], lengths, int(lengths.max()), selector, 0.3,
        BLOCKS, SIZE, 8, 4, *CHOICE,
        GEOMETRY.short_list if SELECTORS[selector].has_short_list else 0,
    )  # fmt: skip


def at_each_position(selector, query, tensors, mask, lengths):
    """Return the ids that decode's two ops pick, token by token and sequence by sequence."""
    short = (2, 1, 1) if SELECTORS[selector].has_short_list else (0, 0, 0)
    ids = torch.full((*query.shape[:1], GROUPS, query.shape[2], CHOICE[0]), -1, dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        place = length
        for column in torch.where(mask[row])[0].tolist():
            now = torch.tensor([place], dtype=torch.int32)
            one = slice(row, row + 1)
            scores = torch.ops.sparda.score_blocks(
                query[one, :, column, None], [t[one] for t in tensors], now, selector, 0.3,
                BLOCKS, SIZE, 8, 4, 0, None, *short,
            )  # fmt: skip
            ids[row, :, column] = torch.ops.sparda.select_blocks(
                scores, now, CHOICE[0], SIZE, *CHOICE[1:]
            )[0]
            place += 1
    return ids


MASKS = {
    "no padding": torch.ones(2, 40, dtype=torch.bool),
    "left": torch.arange(40) >= torch.tensor([[0], [25]]),
    "holes": torch.arange(40) % torch.tensor([[3], [5]]) > 0,
    "one sequence": torch.ones(1, 40, dtype=torch.bool),
}


@pytest.mark.parametrize("most", [1, 1 << 24])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("selector", SELECTORS.names())
def test_equals_decode_at_each_position(monkeypatch, selector, mask, most):
    monkeypatch.setattr(room, "_MOST_NUMBERS", most)
    lengths = torch.tensor([130, 57], dtype=torch.int32)[: len(mask)]
    query, tensors = case(selector, lengths, mask)
    got = select(selector, query, tensors, mask, lengths)
    assert torch.equal(got, at_each_position(selector, query, tensors, mask, lengths))
    assert (got[~mask[:, None].expand(got.shape[:3])] == -1).all()


def places(mask, lengths):
    return number_tokens(mask, lengths)[0]


def of_the_past(tensors, lengths):
    """Return the pooled keys before there are new ones: NaN where those will be."""
    before = [t.clone() for t in tensors]
    for row, length in enumerate(lengths.tolist()):
        before[0][row, :, max((length - 8) // 4 + 1, 0) :] = float("nan")
    return before


@pytest.mark.parametrize("most", [1, 1 << 24])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("lengths", [(130, 57), (128, 64), (41, 0)])
def test_what_is_picked_of_the_past_first_is_the_same_choice(monkeypatch, lengths, mask, most):
    """In the middle of a block and at its end; behind the budget, before it and at the start."""
    monkeypatch.setattr(room, "_MOST_NUMBERS", most)
    lengths = torch.tensor(lengths, dtype=torch.int32)[: len(mask)]
    query, tensors = case("forecast", lengths, mask)
    want = select("forecast", query, tensors, mask, lengths)
    known = (
        places(mask, lengths),
        lengths,
        int(lengths.max()),
        "forecast",
        0.3,
        BLOCKS,
        SIZE,
        8,
        4,
        *CHOICE,
    )
    near = room.select_past(query, of_the_past(tensors, lengths), *known)
    got = room.select_tokens(query, tensors, *known, 0, *near)
    assert torch.equal(got, want)
    # So a past block that is read was among those that were picked first.
    first = (lengths // SIZE)[:, None, None, None]
    is_past = (got >= 0) & (got < first)
    assert ((got[..., None] == near[0][..., None, :]).any(-1) | ~is_past).all()
    assert (near[0] <= first).all()
    assert is_past.any()
    assert (near[0][~mask[:, None].expand(near[0].shape[:3])] == -1).all()


def test_without_a_past_nothing_is_picked_of_it():
    mask, none = torch.ones(1, 80, dtype=torch.bool), torch.zeros(1, dtype=torch.int32)
    query, tensors = case("forecast", none, mask)
    known = (places(mask, none), none, 0, "forecast", 0.3, BLOCKS, SIZE, 8, 4, *CHOICE)
    near = room.select_past(query, of_the_past(tensors, none), *known)
    assert near[0].shape == near[1].shape == (1, GROUPS, 80, 1)
    got = room.select_tokens(query, tensors, *known, 0, *near)
    assert torch.equal(got, select("forecast", query, tensors, mask, none))


def test_the_past_is_picked_where_its_stream_says():
    mask, lengths = MASKS["one sequence"], torch.tensor([130], dtype=torch.int32)
    query, tensors = case("forecast", lengths, mask)
    known = (places(mask, lengths), lengths, 130, "forecast", 0.3, BLOCKS, SIZE, 8, 4, *CHOICE)
    want = room.select_past(query, tensors, *known)
    with use_engine(DeferredEngine()) as engine:
        got = room.select_past(query, tensors, *known, 1, SELECT)
        assert engine.num_pending == 1
        current_engine().record(0, SELECT)
        current_engine().wait(0)
    assert torch.equal(got[0], want[0])


def test_tokens_within_the_budget_read_every_block():
    mask = torch.ones(1, 80, dtype=torch.bool)
    lengths = torch.zeros(1, dtype=torch.int32)
    query, tensors = case("infllm2", lengths, mask)
    ids = select("infllm2", query, tensors, mask, lengths)[0, 0]
    assert ids[0].tolist() == [0, -1, -1, -1]
    assert ids[15].tolist() == [0, -1, -1, -1]
    assert ids[16].tolist() == [0, 1, -1, -1]
    assert ids[63].tolist() == [0, 1, 2, 3]
    assert set(ids[64].tolist()) > {0, 3, 4}


def test_how_a_prompt_is_cut_changes_no_choice():
    """A choice knows the keys before its own token alone, whatever else the summary holds."""
    mask = torch.ones(1, 150, dtype=torch.bool)
    none = torch.zeros(1, dtype=torch.int32)
    query, tensors = case("infllm2", none, mask)
    whole = select("infllm2", query, tensors, mask, none)
    for begin, end in ((0, 70), (70, 71), (71, 150)):
        part = select(
            "infllm2", query[:, :, begin:end], tensors, mask[:, begin:end],
            torch.tensor([begin], dtype=torch.int32),
        )  # fmt: skip
        assert torch.equal(part, whole[:, :, begin:end])


@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4"])
def test_candidates_are_what_the_mean_query_scores_best(selector):
    """Of these a token picks as if there were no others, and of all where it has no more."""
    lengths, mask = torch.tensor([90], dtype=torch.int32), torch.ones(1, 70, dtype=torch.bool)
    query, tensors = case(selector, lengths, mask)
    positions = number_tokens(mask, lengths)[0]

    def picked(num_candidates):
        sizes = (BLOCKS, SIZE, 8, 4, *CHOICE)
        return room.select_tokens(
            query, tensors, positions, lengths, 90, selector, 0.3, *sizes,
            num_candidates=num_candidates,
        )  # fmt: skip

    got, of_all, rule = picked(6), picked(0), SELECTORS[selector]
    mean = query.unflatten(1, (GROUPS, -1)).mean(2)
    for token, place in enumerate(positions[0].tolist()):
        now = (tensors, torch.tensor([place], dtype=torch.int32), 0.3, GEOMETRY)
        look = SELECTORS[f"{selector}_forecast"].score(mean[:, :, token, None], *now)
        current = place // SIZE
        forced = [0, current - 1, current]
        for group in range(GROUPS):
            others = range(1, current - 1)
            proposed = sorted(others, key=lambda m: -look[0, group, m])[:3]
            among = torch.zeros(1, GROUPS, BLOCKS, dtype=torch.bool)
            among[..., [*forced, *proposed]] = True
            scores = rule.score_among(query[:, :, token, None], *now, among)[0, group]
            best = sorted(proposed, key=lambda m: -scores[m])[:1]
            assert got[0, group, token].tolist() == sorted(forced + best)
    few = positions[0] < 6 * SIZE
    assert torch.equal(got[:, :, few], of_all[:, :, few])
    assert not torch.equal(got, of_all)
    assert torch.equal(picked(10), of_all)
