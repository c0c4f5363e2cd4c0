from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl  # noqa: TC002 - what a kernel's annotations name
from hypothesis import given
from hypothesis import strategies as st

from sparda_compile.kernels.gpu.launch import (
    Launch,
    address_of,
    collect_launches,
    compile_ahead,
    interpreting,
    launch,
    power_of_two,
    rows_of,
)


@given(size=st.integers(1, 1 << 20), least=st.sampled_from([1, 2, 16, 64]))
def test_power_of_two_is_the_smallest_that_holds_both(size, least):
    got = power_of_two(size, least)
    assert got & (got - 1) == 0
    assert got >= max(size, least)
    assert got == least or got // 2 < size


@pytest.mark.parametrize(("size", "want"), [(1, 1), (2, 2), (3, 4), (96, 128), (128, 128)])
def test_powers_of_two(size, want):
    assert power_of_two(size) == want


def test_kernels_are_interpreted_exactly_where_there_is_no_gpu(device):
    assert interpreting() == (device == "cpu")


def test_rows_of_a_transpose_are_read_in_place(device):
    tensor = torch.randn(2, 1, 3, 8, device=device).transpose(1, 2)
    rows, by_row, by_head = rows_of(tensor)
    assert rows.data_ptr() == tensor.data_ptr()
    assert (by_row, by_head) == (24, 8)


def test_rows_of_a_sliced_projection_are_read_in_place(device):
    tensor = torch.randn(2, 1, 9, 8, device=device)[:, :, 3:6].transpose(1, 2)
    rows, by_row, by_head = rows_of(tensor)
    assert rows.data_ptr() == tensor.data_ptr()
    assert (by_row, by_head) == (72, 8)


def test_rows_with_gaps_between_elements_are_copied(device):
    tensor = torch.randn(2, 3, 8, 1, device=device).transpose(-1, -2)[..., ::2]
    rows, by_row, by_head = rows_of(tensor)
    assert torch.equal(rows, tensor)
    assert (by_row, by_head) == (12, 4)
    assert rows.stride(-1) == 1


class Kernel:
    """Stands for a kernel: notes what is compiled and what is launched."""

    def __init__(self, fails=False):
        self.compiled, self.launched, self.fails = [], [], fails
        self.may_end = threading.Event()
        self.kwargs = {"do_not_specialize": ["plain"]}
        self.do_not_specialize = ["plain"]

    @staticmethod
    def fn(x, number, plain=0, SIZE: tl.constexpr = 0):
        """Has the parameters of the kernel."""

    def warmup(self, *args, grid, **options):
        assert self.may_end.wait(5)
        if self.fails:
            raise RuntimeError("does not fit")
        self.compiled.append((args, grid, options))
        return SimpleNamespace(run=None)

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append((args, grid, options))


def test_what_is_collected_is_not_launched():
    kernel = Kernel()
    with collect_launches() as launches:
        launch(kernel, (3, 2))(7, num_warps=4)
    assert not kernel.launched
    assert launches == [Launch(kernel, (3, 2), (7,), {"num_warps": 4})]
    launch(kernel, (3, 2))(7, num_warps=4)
    assert kernel.launched == [((7,), (3, 2), {"num_warps": 4})]


def test_a_launch_waits_for_its_kernel_and_for_no_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    slow, other = Kernel(), Kernel()
    launches = [Launch(slow, (1,), (torch.empty(3, dtype=torch.half), 5), {"num_warps": 2})]
    (future,) = compile_ahead(launches, torch.device("cuda"))
    launch(other, (1,))()
    assert not future.done()
    assert len(other.launched) == 1
    threading.Timer(0.05, slow.may_end.set).start()
    launch(slow, (1,))(torch.empty(4, dtype=torch.half), 7, num_warps=2)
    assert future.done()
    ((args, grid, options),) = slow.compiled
    assert (args[0].dtype, args[1], grid, options) == (torch.half, 5, (1,), {"num_warps": 2})


def form(*args, **options):
    return Launch(Kernel(), (1,), args, options).form


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        ((torch.empty(3), 32), (torch.empty(5, 2), 64), True),
        ((torch.empty(3), 32), (torch.empty(3).half(), 32), False),
        ((None, 5), (None, 7), True),
        ((None, 5), (None, 16), False),
        ((None, 2), (None, 1), False),
        ((None, 16), (None, 1 << 31), False),
        ((None, 0.5), (None, 0.7), True),
        ((None, 5, 16), (None, 5, 1), True),
        ((None, 5, 16), (None, 5, 1 << 31), False),
        ((None, 5, 16, 4), (None, 5, 16, 4), True),
        ((None, 5, 16, 4), (None, 5, 16, 8), False),
        ((None, 5, 16, 1), (None, 5, 16, True), False),
    ],
)
def test_forms_are_those_that_triton_compiles(one, other, are_equal):
    assert (form(*one) == form(*other)) == are_equal
    assert form(*one, num_warps=4) != form(*one, num_warps=8)


def test_a_form_is_compiled_once_and_waited_for_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    kernel = Kernel()
    launches = [Launch(kernel, (1,), (None, number, 0, 4), {}) for number in (16, 32, 5)]
    futures = compile_ahead(launches, torch.device("cuda"))
    assert futures[0] is futures[1] is not futures[2]
    assert compile_ahead(launches, torch.device("cuda")) == futures
    launch(kernel, (1,))(None, 5, 0, 8)  # of a form that nobody compiles
    assert not any(future.done() for future in futures)
    kernel.may_end.set()
    launch(kernel, (1,))(None, 48, 0, 4)
    assert futures[0].done()
    assert len(kernel.launched) == 2
    futures[2].result(5)
    assert [args[1] for args, *_ in sorted(kernel.compiled, key=lambda it: it[0][1])] == [5, 16]


def test_an_address_is_read_unless_launches_are_collected():
    tensor = torch.empty(3)
    assert address_of(tensor) == tensor.data_ptr() != 0
    with collect_launches():
        assert address_of(tensor) == 0


def test_what_cannot_be_compiled_ahead_is_launched_as_ever(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    kernel = Kernel(fails=True)
    kernel.may_end.set()
    with caplog.at_level("DEBUG", "sparda_compile"):
        compile_ahead([Launch(kernel, (1,), (), {})], torch.device("cuda"))
        launch(kernel, (1,))()
    assert "was not compiled ahead" in caplog.text
    assert len(kernel.launched) == 1
