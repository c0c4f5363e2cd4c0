"""What is remembered of functions on fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparda_compile.graph import fake_runner
from sparda_compile.graph.fake_runner import FakeRunner, leaves_of, map_leaves


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch):
    monkeypatch.setattr(fake_runner, "_SEEN", {})


class TestRunner:
    """What is remembered is what would have come out."""

    FUNCTIONS = (
        (torch.split, lambda x: ((x, 2, 1), {})),
        (torch.Tensor.transpose, lambda x: ((x, 0, 1), {})),
        (torch.add, lambda x: ((x, x), {"alpha": 2})),
        (torch.max, lambda x: ((x, 1), {"keepdim": True})),
        (torch.Tensor.to, lambda x: ((x, torch.float16), {})),
        (torch.Tensor.__getitem__, lambda x: ((x, (slice(0, 1), None)), {})),
    )

    @pytest.mark.parametrize(("function", "arguments"), FUNCTIONS)
    def test_second_result_is_like_the_first(self, function, arguments):
        runner = FakeRunner.of(FakeTensorMode())
        results = []
        for _ in range(2):
            with runner.fake_mode:
                x = torch.empty(4, 6)
            args, kwargs = arguments(x)
            results.append(leaves_of(runner.run(function, args, kwargs)))
        for one, other in zip(*results, strict=True):
            assert one is not other
            for name in ("shape", "dtype", "device"):
                assert getattr(one, name) == getattr(other, name)
            assert one.stride() == other.stride()
        assert len(runner._seen) == 1

    def test_other_numbers_are_other_calls(self):
        runner = FakeRunner.of(FakeTensorMode())
        with runner.fake_mode:
            x = torch.empty(4, 6)
        shapes = {tuple(runner.run(torch.Tensor.view, (x, n, -1), {}).shape) for n in (2, 3, 4)}
        assert shapes == {(2, 12), (3, 8), (4, 6)}

    def test_true_is_not_one(self):
        runner = FakeRunner.of(FakeTensorMode())
        with runner.fake_mode:
            x = torch.empty(4, 6)
        assert runner.run(torch.sum, (x, 1, True), {}).dim() == 2
        assert runner.run(torch.sum, (x, 1, False), {}).dim() == 1

    def test_a_constant_is_not_taken_for_a_shape(self):
        runner = FakeRunner.of(FakeTensorMode())
        with runner.fake_mode:
            two, three = torch.tensor(2), torch.tensor(3)
        values = [runner.run(torch.Tensor.item, (x,), {}) for x in (two, three)]
        assert values == [2, 3]


def test_what_one_mode_has_seen_another_one_makes_for_itself():
    calls = []

    def doubled(x):
        calls.append(x)
        return x + x

    for mode in (FakeTensorMode(), FakeTensorMode()):
        with mode:
            x = torch.empty(4, 6)
        result = FakeRunner.of(mode).run(doubled, (x,), {})
        assert result.fake_mode is mode
        assert result.shape == (4, 6)
    assert len(calls) == 1


def test_other_settings_are_other_calls():
    """A number beside integers becomes a float of the default dtype."""
    found = []
    for dtype in (torch.float32, torch.float64):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            mode = FakeTensorMode()
            with mode:
                x = torch.empty(3, dtype=torch.int64)
            found.append(FakeRunner.of(mode).run(torch.mul, (x, 0.5), {}).dtype)
        finally:
            torch.set_default_dtype(before)
    assert found == [torch.float32, torch.float64]


def test_no_more_is_remembered_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(fake_runner, "_MOST_SEEN", 2)
    runner = FakeRunner.of(FakeTensorMode())
    with runner.fake_mode:
        x = torch.empty(4, 6)
    for size in (1, 2, 3):
        runner.run(torch.narrow, (x, 0, 0, size), {})
    assert len(runner._seen) == 1


def test_leaves_go_and_come_in_one_order():
    value = {"a": [1, (2, None)], "b": slice(3, 4)}
    assert leaves_of(value) == [1, 2, None, 3, 4, None]
    assert map_leaves(value, lambda x: x) == value
    assert map_leaves(torch.Size([1, 2]), str) == ("1", "2")
