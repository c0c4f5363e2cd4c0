from __future__ import annotations

import pytest
import torch

from sparda_compile.errors import ConfigError
from sparda_compile.training.teacher import aligned_teacher, fine_keys

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize(
    ("shape", "queries", "pool", "softcap", "dtype"),
    [
        ((2, 4, 2, 150, 16), range(70, 150), (8, 4), 0.0, torch.float32),
        ((1, 6, 3, 261, 20), range(33, 100), (32, 16), 5.0, torch.float32),
        ((1, 5, 5, 65, 8), range(64, 65), (16, 16), 0.0, torch.float32),
        ((1, 4, 1, 140, 16), range(130, 140), (32, 16), 0.0, torch.float16),
        ((1, 2, 2, 40, 16), range(40), (4, 1), 0.0, torch.float32),
    ],
)
def test_kernels_agree_with_the_plain_teacher(shape, queries, pool, softcap, dtype):
    batch, heads, groups, tokens, dim = shape
    generator = torch.Generator().manual_seed(1)
    # As a model makes them: heads are a transposed view.
    query = torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    key = torch.randn(batch, groups, tokens, dim, generator=generator).to(dtype)
    inputs = (query, fine_keys(key), queries, pool, 0.7, softcap)
    want = aligned_teacher(*inputs, backend="plain")
    got = aligned_teacher(*inputs, backend="triton")
    assert want.max() > 0.1
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


def test_stride_that_is_no_power_of_two_is_refused():
    query, key = torch.zeros(1, 2, 30, 8), torch.zeros(1, 2, 30, 8)
    with pytest.raises(ConfigError, match=r"pool_stride=6.*backend='plain'"):
        aligned_teacher(query, fine_keys(key), range(9), (12, 6), 1.0, backend="triton")
