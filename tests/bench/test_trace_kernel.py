"""The kernel that follows a trace equals the reference."""

from __future__ import annotations

import pytest
import torch

trace_kernel = pytest.importorskip("sparda_compile.bench.trace_kernel")


def check(device, lengths, groups, num_steps, num_blocks):
    batch = len(lengths)
    trace = torch.rand(batch, groups, num_steps, num_blocks) < 0.3
    length = torch.tensor(lengths, dtype=torch.int32)
    want = torch.randn(batch, groups, num_blocks)
    want[..., ::3] = float("-inf")
    got = want.clone().to(device)
    want[trace[torch.arange(batch), :, length.long() % num_steps]] = 1e30
    trace_kernel.raise_scores(trace.to(device), length.to(device), got, 1e30)
    assert torch.equal(got.cpu(), want)
    assert want.eq(1e30).any()


@pytest.mark.parametrize("num_blocks", [5, 1030])
def test_it_raises_the_scores_that_it_names_for_the_step(num_blocks):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(device, [0, 1, 2, 3, 1000], 2, 3, num_blocks)


@pytest.mark.gpu
def test_long_trace():
    check("cuda", [0, 63, 64, 100_000], 8, 64, 2048)
