"""Log-sum-exps of blocks against PyTorch, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.errors import ConfigError

pytest.importorskip("triton")

from sparda_compile.training.block_logs_kernel import block_logs


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("counted", [(0, 0), (0, 1), (1, 2)])
def test_logs_of_blocks(counted):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 150, 4, 8, generator=generator).transpose(1, 2)
    k = torch.randn(1, 2, 150, 8, generator=generator)
    first, behind = counted
    logs, lse = block_logs(query, k, range(40, 150), 16, 0.3, 2.0, counted)
    scores = 2.0 * torch.tanh(query @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3 / 2.0)
    scores = torch.nn.functional.pad(scores, (0, 10), value=float("-inf"))
    scores.masked_fill_(torch.arange(160) > torch.arange(150)[:, None], float("-inf"))
    block, current = torch.arange(10), torch.arange(150)[:, None] // 16
    counts = (block >= first) & (block <= current - behind)
    want = scores.unflatten(-1, (10, 16)).logsumexp(-1).masked_fill(~counts, float("-inf"))
    ln_2 = torch.tensor(2.0).log()
    got = logs.transpose(-1, -2) * ln_2
    counts, want = counts[40:].expand_as(got), want[:, :, 40:]
    torch.testing.assert_close(got[counts], want[counts], rtol=1e-5, atol=1e-5)
    has_any = counts.any(-1)
    torch.testing.assert_close(lse[has_any] * ln_2, want.logsumexp(-1)[has_any])


def test_head_dims_beyond_the_limit_are_refused():
    query = torch.zeros(1, 1, 100, 264)
    with pytest.raises(ConfigError, match=r"head_dim=264.*backend='plain'"):
        block_logs(query, query, range(50, 60), 16, 1.0, 0.0, (0, 0))
