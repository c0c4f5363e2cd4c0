"""Selectors on low-bit keys against loops over channels and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparda_compile.selectors import SELECTORS, Geometry, summary_named
from sparda_compile.selectors.lowbit import LowBitKeys, dequantize, quantize

SIZE = 16
GEOMETRY = Geometry(5, SIZE, 8, 4)
BITS = (2, 4)


def empty(bits, rows=1, groups=2, dim=3, dtype=torch.float32, geometry=GEOMETRY):
    """Return the tensors of an empty summary, whatever memory held before."""
    summary = LowBitKeys(bits)
    tensors = []
    for name, shape in summary.shapes(geometry, dim).items():
        kind = summary.dtypes.get(name, dtype)
        tensors.append(torch.full((rows, groups, *shape), math.nan).nan_to_num(77).to(kind))
    summary.reset(tensors)
    return tensors


def filled(bits, lengths, groups=2, dim=12, seed=0):
    """Return a summary of random keys, and the keys, [B, G, S, D]."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(len(lengths), groups, max(lengths, default=0), dim, generator=generator)
    tensors = empty(bits, len(lengths), groups, dim)
    mask = torch.arange(k.shape[2]) < torch.tensor(lengths)[:, None]
    nothing = torch.zeros(len(lengths), dtype=torch.int32)
    LowBitKeys(bits).extend(tensors, k, nothing, mask, GEOMETRY)
    return tensors, k, generator


def approximate(keys, bits):
    """Return a channel's keys of one block after quantisation, in double precision."""
    low, high = min(keys), max(keys)
    step = (high - low) / (2**bits - 1)
    return [low + step * math.floor((k - low) / step + 0.5) for k in keys]


@pytest.mark.parametrize("bits", BITS)
def test_codes_follow_the_formula(bits):
    generator = torch.Generator().manual_seed(bits)
    k = torch.randn(SIZE, 7, generator=generator, dtype=torch.float64).float()
    codes, span, base = quantize(k, bits)
    assert codes.shape == (SIZE * bits // 8, 7)
    got = dequantize(codes, span, base, bits)
    for channel in range(7):
        want = torch.tensor(approximate(k[:, channel].double().tolist(), bits))
        torch.testing.assert_close(got[:, channel], want.float())
    first = (k[0, 0] - base[0]) * 2**bits / span[0] - 2**bits
    # The first token is in the lowest bits.
    assert codes[0, 0].item() & (2**bits - 1) == math.floor(first + 0.5)


@given(
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    spread=st.sampled_from([1e-30, 1e-6, 1e-3, 1.0, 300.0]),
    shift=st.sampled_from([0.0, -1.0, 40.0, 3e4]),
    seed=st.integers(0, 99),
)
def test_error_is_at_most_half_a_step_of_the_channel(bits, dtype, spread, shift, seed):
    """Also where a step rounds, where keys are nearly equal and where they are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    k = (torch.randn(2, 3, SIZE, 5, generator=generator) * spread + shift).to(dtype)
    codes, span, base = quantize(k, bits)
    error = (dequantize(codes, span, base, bits).float() - k.float()).abs().amax(-2)
    wide = (k.float().amax(-2) - k.float().amin(-2)) / (2**bits - 1)
    # Span, base and what they give round by themselves.
    size = k.float().abs().amax(-2) + 2**bits * wide
    rounding = 2 * torch.finfo(dtype).eps * size + torch.finfo(dtype).tiny
    assert (error <= wide / 2 + rounding).all()


@pytest.mark.parametrize("bits", BITS)
def test_keys_of_64_bits_have_the_codes_of_32(bits):
    keys = torch.randn(3, SIZE, 5, generator=torch.Generator().manual_seed(bits))
    codes, *others = quantize(keys, bits)
    wide_codes, *wide_others = quantize(keys.double(), bits)
    assert torch.equal(wide_codes, codes)
    for wide, other in zip(wide_others, others, strict=True):
        assert wide.dtype == torch.float64
        assert torch.equal(wide, other.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_a_constant_channel_is_exact_and_an_outlier_spoils_its_own_channel_alone(bits, dtype):
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(SIZE, 4, generator=generator).to(dtype)
    plain = dequantize(*quantize(k, bits), bits)
    k[:, 1] = -3.25
    k[5, 2] = 6e4
    codes, span, base = quantize(k, bits)
    got = dequantize(codes, span, base, bits)
    assert torch.equal(got[:, 1], k[:, 1])
    assert span[1] == 0
    assert torch.equal(got[:, [0, 3]], plain[:, [0, 3]])
    assert got.isfinite().all()
    largest = torch.finfo(dtype).max
    widest = dequantize(*quantize(torch.tensor([[-largest], [largest]] * 8, dtype=dtype), 4), 4)
    assert dtype is not torch.float16 or widest.isfinite().all()


@given(
    bits=st.sampled_from(BITS),
    chunks=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_any_chunks_give_the_same_bits(bits, chunks, seed):
    """A chunk of 0 is one token in the decode form; others come with padding."""
    generator = torch.Generator().manual_seed(seed)
    tensors, seen = empty(bits), torch.zeros(2, 0, 3)
    for chunk in chunks:
        num_tokens = min(chunk or 1, 5 * SIZE - seen.shape[1])
        if not num_tokens:
            break
        length = torch.tensor([seen.shape[1]], dtype=torch.int32)
        k_BGTD = torch.randn(1, 2, num_tokens, 3, generator=generator)
        mask = None if chunk == 0 else torch.rand(1, num_tokens, generator=generator) < 0.8
        LowBitKeys(bits).extend(tensors, k_BGTD, length, mask, GEOMETRY)
        new = k_BGTD[0] if mask is None else k_BGTD[0][:, mask[0]]
        seen = torch.cat([seen, new], dim=1)
    num_full, rest = divmod(seen.shape[1], SIZE)
    whole = seen[:, : num_full * SIZE].unflatten(1, (-1, SIZE)) if num_full else seen[:, None, :0]
    for tensor, want in zip(tensors, quantize(whole, bits) if num_full else (), strict=False):
        assert torch.equal(tensor[0, :, :num_full], want)
    for tensor in tensors[:3]:
        assert not tensor[0, :, num_full:].any()  # nothing is written before a block is full
    assert torch.equal(tensors[3][0, :, :rest], seen[:, num_full * SIZE :])


def test_rows_of_a_batch_keep_their_own_lengths():
    generator = torch.Generator().manual_seed(0)
    tensors, seen = empty(2, rows=3), [torch.zeros(2, 0, 3) for _ in range(3)]
    for step in range(40):
        width = 21 if step == 0 else 1
        k_BGTD = torch.randn(3, 2, width, 3, generator=generator)
        starts = [0, 9, 20] if step == 0 else [0, 0, 0]
        mask = torch.arange(width) >= torch.tensor(starts)[:, None]
        lengths = torch.tensor([k.shape[1] for k in seen], dtype=torch.int32)
        LowBitKeys(2).extend(tensors, k_BGTD, lengths, mask if step == 0 else None, GEOMETRY)
        seen = [torch.cat([k, k_BGTD[i][:, mask[i]]], dim=1) for i, k in enumerate(seen)]
    for row, keys in enumerate(seen):
        num_full = keys.shape[1] // SIZE
        full = keys[:, : num_full * SIZE].unflatten(1, (num_full, SIZE))
        for tensor, want in zip(tensors, quantize(full, 2), strict=False):
            assert torch.equal(tensor[row, :, :num_full], want)


@pytest.mark.parametrize("length", [0, 15, 16, 47, 80])
@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("bits", BITS)
def test_scores_are_the_mass_of_attention_over_approximate_keys(bits, repeat, length):
    tensors, k, generator = filled(bits, [length])
    query = torch.randn(1, 2 * repeat, 1, 12, generator=generator)
    lengths = torch.tensor([length], dtype=torch.int32)
    got = SELECTORS[f"lowbit{bits}"].score(query, tensors, lengths, 0.3, GEOMETRY)
    assert got.shape == (1, 2, 5)
    assert got.dtype == torch.float32
    full = length // SIZE
    for group in range(2):
        masses = [0.0] * full
        blocks = k[0, group, : full * SIZE].unflatten(0, (full, SIZE)).double().tolist()
        near = [
            list(
                zip(
                    *(approximate(channel, bits) for channel in zip(*block, strict=True)),
                    strict=True,
                )
            )
            for block in blocks
        ]
        for head in query[0, group * repeat : (group + 1) * repeat, 0].double().tolist():
            logits = [
                [0.3 * sum(q * x for q, x in zip(head, key, strict=True)) for key in block]
                for block in near
            ]
            total = sum(math.exp(x) for block in logits for x in block)
            for m, block in enumerate(logits):
                masses[m] += sum(math.exp(x) for x in block) / total
        for m in range(5):
            want = masses[m] if m < full else -math.inf
            assert got[0, group, m].item() == pytest.approx(want, rel=1e-4, abs=1e-7)
        if full:
            assert sum(masses) == pytest.approx(repeat)


@pytest.mark.parametrize("bits", BITS)
def test_a_forecast_ranks_blocks_as_a_query_of_one_head_does(bits):
    tensors, _, generator = filled(bits, [80, 33])
    forecast = torch.randn(2, 2, 1, 12, generator=generator)
    lengths = torch.tensor([80, 33], dtype=torch.int32)
    args = (forecast, tensors, lengths, 0.3, GEOMETRY)
    mass = SELECTORS[f"lowbit{bits}"].score(*args)
    level = SELECTORS[f"lowbit{bits}_forecast"].score(*args)
    torch.testing.assert_close(level.softmax(-1), mass.where(mass > -math.inf, 0.0))
    assert torch.equal(level == -math.inf, mass == -math.inf)
    assert level[1, :, 2:].eq(-math.inf).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_forecasts_score_of_a_full_block_settles(bits):
    rule = SELECTORS[f"lowbit{bits}_forecast"]
    assert rule.settles
    assert not SELECTORS[f"lowbit{bits}"].settles
    tensors, _, generator = filled(bits, [40])
    forecast = torch.randn(1, 2, 1, 12, generator=generator)
    before = rule.score(forecast, tensors, torch.tensor([40]), 1.0, GEOMETRY)
    k = torch.randn(1, 2, 30, 12, generator=generator) * 50
    mask = torch.ones(1, 30, dtype=torch.bool)
    LowBitKeys(bits).extend(tensors, k, torch.tensor([40]), mask, GEOMETRY)
    after = rule.score(forecast, tensors, torch.tensor([70]), 1.0, GEOMETRY)
    assert torch.equal(before[..., :2], after[..., :2])
    assert after[..., 2:4].isfinite().all()


@pytest.mark.parametrize("name", ["lowbit2", "lowbit4", "lowbit2_forecast", "lowbit4_forecast"])
def test_what_a_token_sees_ends_with_the_block_before_its_own(name):
    """So it scores in a prompt what it would score in a decode step."""
    rule = SELECTORS[name]
    tensors, _, generator = filled(rule.bits, [75])
    early, _, _ = filled(rule.bits, [40])
    query = torch.randn(1, 2, 1, 12, generator=generator)
    k = torch.randn(1, 2, 80, 12, generator=torch.Generator().manual_seed(0))
    for held, keys in ((tensors, k[:, :, :75]), (early, k[:, :, :40])):
        length = torch.zeros(1, dtype=torch.int32)
        mask = torch.ones(1, keys.shape[2], dtype=torch.bool)
        rule.summary.extend(held, keys, length, mask, GEOMETRY)
    place = torch.tensor([40])
    got = [rule.score(query, held, place, 0.5, GEOMETRY) for held in (tensors, early)]
    assert torch.equal(*got)


@pytest.mark.parametrize("name", ["lowbit2", "lowbit4", "lowbit2_forecast", "lowbit4_forecast"])
def test_large_logits_and_empty_caches_give_no_nan(name):
    rule = SELECTORS[name]
    tensors, _, generator = filled(rule.bits, [80, 3, 31])
    query = torch.randn(3, 2, 1, 12, generator=generator) * 1e4
    scores = rule.score(query, tensors, torch.tensor([80, 3, 31]), 1.0, GEOMETRY)
    assert not scores.isnan().any()
    assert scores[1].eq(-math.inf).all()
    assert scores[2].isfinite().sum(-1).tolist() == [1, 1]


@pytest.mark.parametrize("name", ["lowbit2", "lowbit4", "lowbit2_forecast", "lowbit4_forecast"])
def test_score_reads_no_value_and_stays_on_its_device(name):
    """So a CUDA graph can hold it: a meta tensor has a shape and a device, and nothing to read."""
    rule = SELECTORS[name]
    tensors = [tensor.to("meta") for tensor in empty(rule.bits, 3, 2, 12)]
    query = torch.empty(3, 2, 1, 12, device="meta")
    lengths = torch.empty(3, dtype=torch.int32, device="meta")
    scores = rule.score(query, tensors, lengths, 1.0, GEOMETRY)
    assert scores.shape == (3, 2, 5)
    assert scores.device.type == "meta"


def test_bytes_are_those_of_the_codes_and_two_numbers_a_channel():
    """With 128K tokens, 2 KV heads and 32 layers in bfloat16: 256, or 512, and 64 MiB."""
    geometry = Geometry(2048, 64, 32, 16)
    for bits, mib in ((2, 256), (4, 512)):
        summary = summary_named(f"lowbit{bits}_keys")
        shapes = summary.shapes(geometry, 128)
        codes, *numbers = (math.prod(shape) * 2 * 32 / 2**20 for shape in shapes.values())
        span, base, opened = (2 * each for each in numbers)
        assert (codes, span + base, opened) == (mib, 64, 1)


@pytest.mark.parametrize("bits", BITS)
def test_some_blocks_are_scored_as_if_there_were_no_others(bits):
    tensors, _, generator = filled(bits, [70, 35])
    query = torch.randn(2, 4, 1, 12, generator=generator)
    rule, lengths = SELECTORS[f"lowbit{bits}"], torch.tensor([70, 35], dtype=torch.int32)
    among = torch.tensor([True, False, True, False, True]).expand(2, 2, 5)
    scored = (query, tensors, lengths, 0.3, GEOMETRY)
    got, of_all = rule.score_among(*scored, among), rule.score(*scored)
    assert torch.equal(got.isfinite(), among & of_all.isfinite())
    assert torch.allclose(got[0, :, [0, 2]].sum(-1), torch.tensor(2.0))  # heads of a group
    # A head's shares keep their ratio, so of one head blocks keep their order.
    one = rule.score_among(query[:, [0, 2]], *scored[1:], among)
    whole = rule.score(query[:, [0, 2]], *scored[1:])
    torch.testing.assert_close(one[0, :, 0] / one[0, :, 2], whole[0, :, 0] / whole[0, :, 2])
    assert torch.equal(rule.score_among(*scored, torch.ones_like(among)), of_all)


def test_only_selectors_of_query_heads_score_some_blocks_alone():
    assert [s.name for s in SELECTORS if s.narrows] == ["lowbit2", "lowbit4"]
