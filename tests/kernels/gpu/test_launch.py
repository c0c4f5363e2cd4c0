from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparda_compile.kernels.gpu.launch import interpreting, power_of_two, rows_of


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
