from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels.window_attention import window_attention


def truth(query_HTD, k_GSD, v_GSD, past, window, scale, softcap):
    out = torch.zeros(query_HTD.shape, dtype=torch.float64)
    repeat = query_HTD.shape[0] // k_GSD.shape[0]
    for head in range(query_HTD.shape[0]):
        for t in range(query_HTD.shape[1]):
            seen = slice(max(past + t + 1 - window, 0), past + t + 1)
            scores = k_GSD[head // repeat, seen].double() @ query_HTD[head, t].double() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[head, t] = scores.softmax(0) @ v_GSD[head // repeat, seen].double()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("window", "repeat", "dim", "softcap"),
    [(1, 1, 16, 0.0), (7, 3, 60, 0.0), (16, 7, 16, 2.0), (100, 1, 16, 0.0)],
)
def test_any_turns_equal_attention_over_the_last_tokens(
    assert_near, window, repeat, dim, softcap, dtype
):
    generator = torch.Generator().manual_seed(0)
    rings = [torch.zeros(2, 2, window, dim, dtype=dtype) for _ in range(2)]
    seen = [torch.zeros(2, 2, 0, dim, dtype=dtype) for _ in range(2)]
    lengths = torch.zeros(2, dtype=torch.int32)
    for num_tokens in (5, 1, 1, 23, 1, 1, 1):
        query = torch.randn(2, 2 * repeat, num_tokens, dim, generator=generator).to(dtype)
        kv = torch.randn(2, 2, 2, num_tokens, dim, generator=generator).to(dtype)
        mask = None
        real = torch.ones(2, num_tokens, dtype=torch.bool)
        if num_tokens > 1:
            real[1, : num_tokens // 2] = False
            mask = real
        got = window_attention(query, *kv, mask, lengths, *rings, 0.3, softcap)
        for row in range(2):
            past = seen[row].shape[2]
            new = kv[:, row][:, :, real[row]]
            seen[row] = torch.cat([seen[row], new], dim=2)
            want = truth(query[row][:, real[row]], *seen[row], past, window, 0.3, softcap)
            assert_near(got[row][:, real[row]], want, dtype)
            assert got[row][:, ~real[row]].eq(0).all()
        lengths += real.sum(1).int()
        for row in range(2):
            length = int(lengths[row])
            for position in range(max(length - window, 0), length):
                for ring, want in zip(rings, seen[row], strict=True):
                    assert torch.equal(ring[row, :, position % window], want[:, position])
