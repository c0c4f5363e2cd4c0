"""Every answer can be read off the prompt by a parser that shares nothing with the generators."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.haystack import Maker
from sparda_compile.evaluation.lookup import lookup
from sparda_compile.evaluation.tasks import TASKS, make_batch
from sparda_compile.evaluation.vocabulary import from_bytes

RECORD, ASK, ASK_ALL, LINK, TRACK, COMMON, FREQUENT = 2, 3, 4, 5, 6, 7, 8
KEYS, VALUES = range(64, 1088), range(1088, 1600)


def triples(tokens, marker):
    """Return (first, second, place of second) of each record, in order."""
    return [
        (tokens[i + 1], tokens[i + 2], i + 2) for i, token in enumerate(tokens) if token == marker
    ]


def solve(haystack, question):
    """Return the answer tokens to the first question, and where they stand in the haystack."""
    kind, *asked = question
    if kind in (ASK, ASK_ALL):
        found = [(v, p) for key, v, p in triples(haystack, RECORD) if key == asked[0]]
    elif kind == TRACK:
        found, holder = [], asked[0]
        for source, target, place in triples(haystack, LINK):
            if source == holder:
                found.append((target, place))
                holder = target
    else:
        counts = Counter(token for token in haystack if token in KEYS)
        best = [word for word, _ in counts.most_common(4 if kind == COMMON else 3)]
        best = sorted(best) if kind == COMMON else best
        found = [(word, haystack.index(word)) for word in best]
    return [token for token, _ in found], [place for _, place in found]


def check(batch, row):
    """Solve every question of a sequence and compare."""
    tokens = batch.ids_BT[row].tolist()
    places = batch.answer_positions_A.tolist()
    haystack = tokens[: batch.question_start]
    answers, evidence = [], []
    place = batch.question_start
    while place < len(tokens):
        end = next((p for p in places if p >= place), None)
        found, where = solve(haystack, tokens[place:end])
        answers += found
        evidence += where
        place = end + len(found)
    assert answers == batch.answers_BA[row].tolist() == [tokens[p] for p in places]
    assert evidence == batch.evidence_BA[row].tolist()
    assert batch.prompt(row) == tokens[: places[0]]


@settings(max_examples=25, deadline=None)
@given(
    task=st.sampled_from(tuple(TASKS)),
    length=st.integers(112, 700),
    seed=st.integers(0, 2**31),
)
def test_answers_follow_from_the_prompt(task, length, seed):
    batch = make_batch(task, batch_size=2, length=length, seed=seed)
    assert batch.ids_BT.shape == (2, length)
    for row in range(2):
        check(batch, row)


@settings(max_examples=15, deadline=None)
@given(records=st.integers(1, 40), queries=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_training_sequences_follow_the_same_rules(records, queries, seed):
    maker = Maker(2, 300, torch.Generator().manual_seed(seed))
    batch = lookup(maker, num_records=records, num_queries=queries)
    assert len(batch.answer_positions_A) == min(records, queries)
    for row in range(2):
        check(batch, row)
        keys = [key for key, _, _ in triples(batch.ids_BT[row].tolist(), ASK)]
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize("task", TASKS)
def test_seed_decides_everything(task):
    first, again, other = (
        make_batch(task, batch_size=3, length=200, seed=seed) for seed in (5, 5, 6)
    )
    assert torch.equal(first.ids_BT, again.ids_BT)
    assert torch.equal(first.evidence_BA, again.evidence_BA)
    assert not torch.equal(first.ids_BT, other.ids_BT)
    assert len({tuple(row) for row in first.ids_BT.tolist()}) == 3


def test_needles_land_everywhere():
    batch = make_batch("single_needle", batch_size=2000, length=60, seed=0)
    places = Counter(batch.evidence_BA[:, 0].tolist())
    assert set(places) == set(range(3, 57))
    assert max(places.values()) < 3 * min(places.values())


def test_noise_is_one_sentence_again_and_again():
    tokens = make_batch("single_needle", batch_size=1, length=400, seed=1).ids_BT[0, :397]
    same = tokens[:-16] == tokens[16:]
    # The beginning and the record each break the rhythm where they are and one sentence later.
    assert int((~same).sum()) <= 2 * 3 + 1
    assert len(set(tokens.tolist())) <= 16 + 1 + 3


@pytest.mark.parametrize("task", TASKS)
def test_too_short_is_an_error_that_names_the_least_length(task):
    with pytest.raises(ConfigError, match=rf"{task}.*too small.*or more") as caught:
        make_batch(task, batch_size=1, length=5)
    least = int(str(caught.value).split("use ")[1].split()[0])
    batch = make_batch(task, batch_size=1, length=least)
    check(batch, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"task": "poetry", "batch_size": 1, "length": 100}, "poetry.*single_needle"),
        ({"task": "multi_key", "batch_size": 0, "length": 100}, "batch_size=0"),
    ],
)
def test_wrong_arguments(arguments, words):
    task = arguments.pop("task")
    with pytest.raises(ConfigError, match=words):
        make_batch(task, **arguments)


def test_too_many_keys():
    with pytest.raises(ConfigError, match="1024 or fewer"):
        lookup(Maker(1, 9000, torch.Generator()), num_records=1025, num_queries=1)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [600, 604])
def test_bytes_spell_the_same_task(task, length):
    spelled = make_batch(task, batch_size=2, length=length, seed=3, as_bytes=True)
    plain = make_batch(task, batch_size=2, length=120, seed=3)
    padding = length - 600
    assert spelled.ids_BT.shape == (2, length)
    assert spelled.ids_BT[:, :padding].eq(ord(" ")).all()
    assert from_bytes(spelled.ids_BT[1, padding:].tolist()) == plain.ids_BT[1].tolist()
    assert from_bytes(spelled.answers_BA[0].tolist()) == plain.answers_BA[0].tolist()
    assert torch.equal(spelled.ids_BT.gather(1, spelled.evidence_BA), spelled.answers_BA)
    question = spelled.ids_BT[0, spelled.question_start :].tolist()
    assert from_bytes(question) == plain.ids_BT[0, plain.question_start :].tolist()
