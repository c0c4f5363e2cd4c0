"""Sample numbers say what a size is made of."""

from __future__ import annotations

import pytest

from sparda_compile.sizes import (
    OTHER_SAMPLES,
    SAMPLES,
    Size,
    common_size,
    concrete,
    size_of,
    size_text,
)

B, T = SAMPLES.batch, SAMPLES.tokens
THEIRS = OTHER_SAMPLES


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (1, "1"), (64, "64"), (-1, "-1"), (B, "B"), (T, "T"), (B * T * 64, "B*T*64"),
        (T * T, "T*T"), (-T, "T*-1"),
    ],
)  # fmt: skip
def test_a_size_in_words(number, text):
    assert size_text(number) == text
    assert size_of(number).is_open == ("B" in text or "T" in text)


def test_numbers_are_put_in_for_open_sizes():
    assert concrete((B, 4, T, B * T, 16), 3, 7) == (3, 4, 7, 21, 16)


@pytest.mark.parametrize(
    "size",
    [Size(5), Size(1, 0, 1), Size(1, 1, 0), Size(3, 1, 1), Size(1, 0, 2), Size(-1, 0, 1),
     Size(1, 0, 1, 7), Size(2, 0, 1, -1), Size(4, 1, 0, 3)],
)  # fmt: skip
def test_two_traces_tell_what_a_number_is(size):
    one, other = (size.value(s.batch, s.tokens) for s in (SAMPLES, THEIRS))
    assert common_size(one, other, SAMPLES, THEIRS) == size


@pytest.mark.parametrize(("one", "other"), [(T // 2, THEIRS.tokens // 2), (T, THEIRS.tokens + 5)])
def test_what_is_no_product_and_no_sum_is_not_known(one, other):
    assert common_size(one, other, SAMPLES, THEIRS) is None


def test_a_size_that_is_not_open_is_a_number():
    ours, theirs = (s.of("decode") for s in (SAMPLES, THEIRS))
    assert (ours.batch, ours.tokens) == (SAMPLES.batch, 1)
    assert common_size(SAMPLES.batch * 4, 4, ours, theirs) == Size(4, 1, 0)
    assert common_size(3, 4, ours, theirs) is None
    assert SAMPLES.of("prefill") == SAMPLES


def test_samples_are_unlike_any_size_of_a_model():
    numbers = (SAMPLES.batch, SAMPLES.tokens, THEIRS.tokens)
    assert len(set(numbers)) == 3
    assert THEIRS.batch == 1
    for number in numbers:
        assert all(number % small for small in range(2, 200)), number
