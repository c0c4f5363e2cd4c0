from __future__ import annotations

import math

import pytest
import torch

from sparda_compile.capture.lengths import Length, Lengths


def of(tokens: int = 24) -> tuple[Length, Lengths]:
    lengths = Lengths(tokens, lambda: "model.py:7")
    return lengths.wrap(tokens), lengths


@pytest.mark.parametrize(
    ("decide", "limits"),
    [
        (lambda n: n > 100, [100]),
        (lambda n: n <= 100, [100]),
        (lambda n: n + 5 > 100, [95]),
        (lambda n: n - 1 >= 100, [101]),
        (lambda n: 2 * n == 100, [50]),
        (lambda n: n * 2 + n > 90, [30]),
        (lambda n: n + n < 90, [45]),
        (lambda n: n - 24 > 0, [24]),
        (lambda n: n > 80.5, [80]),
        (lambda n: n % 64 == 0, [0]),
        (lambda n: bool(n % 8), [0]),
        (lambda n: max(n, 512), [512]),
        (lambda n: min(n, 512), [512]),
        (lambda n: n != 300 and n < 400, [300, 400]),
    ],
)  # fmt: skip
def test_a_decision_by_the_length_is_noted(decide, limits):
    length, lengths = of()
    want = decide(24)
    assert int(decide(length)) == int(want)
    assert sorted(lengths.compared) == limits
    assert set(lengths.compared.values()) == {"model.py:7"}


@pytest.mark.parametrize(
    "decide",
    [
        lambda n: n == n,
        lambda n: n < n + 1,
        lambda n: n > 1,
        lambda n: n >= 2,
        lambda n: n < 2,
        lambda n: bool(n),
        lambda n: n == 0,
        lambda n: n is None,
        lambda n: n == "24",
        lambda n: n - n > 5,
        lambda n: [*range(n)][-1] == 23,
        lambda n: hash(n) == hash(24),
        lambda n: {24: "x"}[n],
        lambda n: torch.arange(n).shape[0],
        lambda n: n // 7,
        lambda n: math.sqrt(n),
        lambda n: f"{n}",
    ],
)
def test_what_is_the_same_for_every_prompt_is_not(decide):
    length, lengths = of()
    want = decide(24)
    assert decide(length) == want
    kept = {limit for limit in lengths.compared if limit != 24}
    assert kept == set()


def test_shapes_and_single_tokens():
    _, lengths = of()
    shape = lengths.wrap(torch.Size([2, 24, 64]))
    assert isinstance(shape, torch.Size)
    assert [type(size) for size in shape] == [int, Length, int]
    assert type(lengths.wrap(25)) is int
    assert lengths.wrap("24") == "24"
    single = Lengths(1, lambda: "")
    assert type(single.wrap(1)) is int
    assert single.wrap(torch.Size([1, 1])) == torch.Size([1, 1])
