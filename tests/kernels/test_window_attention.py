from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels import window_attention as module
from sparda_compile.kernels.prefill_attention import masked_attention
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


@pytest.mark.parametrize("band", [1, 5, 16, 64])
@pytest.mark.parametrize("window", [1, 4, 11, 40])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_bands_of_any_size_are_one(monkeypatch, assert_near, band, window, softcap):
    """Behind a past of any length, with padding between real tokens too."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 50, 16, generator=generator)
    k, v = torch.randn(2, 3, 2, 50, 16, generator=generator)
    mask = torch.rand(3, 50, generator=generator) < torch.tensor([[0.3], [0.9], [2.0]])
    lengths = torch.tensor([0, window // 2, 97], dtype=torch.int32)
    before = [torch.randn(3, 2, window, 16, generator=generator) for _ in range(2)]
    found = []
    for tokens in (64, band):
        monkeypatch.setattr(module, "WINDOW_TOKENS", tokens)
        rings = [ring.clone() for ring in before]
        out = window_attention(query, k, v, mask, lengths, *rings, 0.3, softcap)
        found.append((out, *rings))
    for row in range(3):
        real, length = mask[row], int(lengths[row])
        # Of what is older nothing is left, and nothing sees it.
        slots = torch.arange(length) % window
        keys, values = (
            torch.cat([ring[row][:, slots], new[row][:, real]], dim=1)
            for ring, new in zip(before, (k, v), strict=True)
        )
        want = truth(query[row][:, real], keys, values, length, window, 0.3, softcap)
        assert_near(found[1][0][row][:, real], want, torch.float32)
    assert_near(found[1][0], found[0][0].double(), torch.float32)
    assert found[1][0].permute(0, 2, 1, 3)[~mask].eq(0).all()
    for got, wanted in zip(found[1][1:], found[0][1:], strict=True):
        assert torch.equal(got, wanted)


def test_time_and_memory_are_those_of_bands(monkeypatch, counted_bytes):
    """Of a token no more keys are looked at than a band may see, however long the prompt is."""
    looked_at = []

    def noted(query, keys, *rest):
        looked_at.append(keys.shape[2])
        return masked_attention(query, keys, *rest)

    monkeypatch.setattr(module, "masked_attention", noted)
    peaks = []
    for tokens in (2048, 6000):
        query, k, v = (torch.randn(1, 2, tokens, 16) for _ in range(3))
        rings = [torch.zeros(1, 2, 30, 16) for _ in range(2)]
        mask, lengths = torch.ones(1, tokens, dtype=torch.bool), torch.zeros(1, dtype=torch.int32)
        given = (query, k, v, mask, lengths, *rings)
        with counted_bytes(given) as counted:
            out = window_attention(*given, 0.3, 0.0)
        peaks.append(counted.peak - out.nbytes)
    assert max(looked_at) == 512 + 29
    # What is left that grows are the columns, in order.
    assert peaks[1] - peaks[0] < 32 * (6000 - 2048)
