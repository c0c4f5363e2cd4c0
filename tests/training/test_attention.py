from __future__ import annotations

import pytest
import torch

from sparda_compile.passes.find import attention_proof
from sparda_compile.training import attention


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window", [0, 7, 33, 90])
def test_it_is_causal_attention(softcap, window, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 70, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 70, 8, generator=generator)
    monkeypatch.setattr(attention, "_TILE_SCORES", 1)  # the smallest tiles, 16 queries
    got = attention.causal_attention(query, k, v, 0.5, softcap, window)
    want = attention_proof.reference_attention(query, k, v, 0.5, softcap, window)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
