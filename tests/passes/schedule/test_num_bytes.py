"""Sizes of values, with the numbers that stand for open ones."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from sparda_compile.config import SpardaConfig
from sparda_compile.passes.base import PassContext
from sparda_compile.passes.machine import MACHINES
from sparda_compile.passes.schedule.num_bytes import EXAMPLE_TOKENS, num_bytes, numel
from sparda_compile.sizes import SAMPLES


@pytest.fixture
def ctx():
    return PassContext(SpardaConfig(), "prefill", {}, "Model", None, MACHINES["h200"], 3)


def test_open_sizes_count_as_the_batch_and_as_an_example_of_a_prompt(ctx):
    assert numel((SAMPLES.batch, 2, 5), ctx) == 3 * 2 * 5
    assert numel((SAMPLES.batch, SAMPLES.tokens, 4), ctx) == 3 * EXAMPLE_TOKENS * 4
    assert numel((), ctx) == 1


def test_bytes_are_elements_times_their_size(ctx):
    half = torch.empty(SAMPLES.batch, 7, dtype=torch.bfloat16, device="meta")
    whole = torch.empty(5, device="meta")
    assert num_bytes(half, ctx) == 3 * 7 * 2
    assert num_bytes([half, (whole, 3)], ctx) == 3 * 7 * 2 + 5 * 4


@pytest.mark.parametrize("value", [None, 7, 2.5, "text", [], ()])
def test_what_is_no_tensor_has_no_bytes(ctx, value):
    assert num_bytes(value, ctx) == 0


def test_a_tensor_made_of_others_has_their_bytes(ctx):
    parts = TwoTensor(torch.empty(4), torch.empty(4))
    assert num_bytes(parts, ctx) == 2 * 4 * 4
