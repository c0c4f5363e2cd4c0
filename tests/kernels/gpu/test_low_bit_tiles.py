from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from low_bit_prompt import Prompt
from picked import first

from sparda_compile.kernels.gpu.launch import interpreting
from sparda_compile.kernels.gpu.low_bit_tiles import Form, add_dots, block_dots, unpacked_keys
from sparda_compile.selectors import Geometry
from sparda_compile.selectors.lowbit import dequantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4"])
@pytest.mark.parametrize("size", [16, 48])
def test_keys_are_those_of_the_codes(device, selector, size, dtype):
    geometry = Geometry(9, size, 16, 16)
    prompt = Prompt(selector, [5 * size], [first(3, 3)], (2, 1, 20), geometry, dtype=dtype)
    asked = prompt.asked(device)
    got = unpacked_keys(asked, 5)
    codes, span, base, _ = (tensor[0, :, :5] for tensor in prompt.summary())
    assert torch.equal(got.cpu(), dequantize(codes, span, base, prompt.rule.bits))
    new = unpacked_keys(asked, 1, is_new=True)  # the block before that of the first new token
    assert torch.equal(new[:, 0], got[:, 4])


@triton.jit
def _masses(
    query, keys, ids, out, count, num_keyed,
    SIZE: tl.constexpr, SPAN: tl.constexpr, BLOCKS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row, dims, place = tl.arange(0, 16), tl.arange(0, DIMS), tl.arange(0, BLOCKS * SPAN)
    at = query + row[:, None] * DIM + dims[None, :]
    vectors = tl.load(at, mask=(dims < DIM)[None, :], other=0.0)
    if INTERPRETED:
        vectors = vectors.to(tl.float32)
    most = tl.full([16, BLOCKS], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([16, BLOCKS], dtype=tl.float32)
    entry = place // SPAN
    block = tl.load(ids + entry, mask=entry < count, other=num_keyed)
    for piece in tl.static_range((SIZE + SPAN - 1) // SPAN):
        slot = piece * SPAN + place % SPAN
        dots = block_dots(vectors, keys, block, slot, num_keyed, SIZE, SPAN, DIM, DIMS, INTERPRETED)
        most, mass = add_dots(dots, most, mass, 0.5)
    each = tl.arange(0, BLOCKS)
    tl.store(out + row[:, None] * BLOCKS + each[None, :], most + tl.log2(mass))


@pytest.mark.parametrize(("size", "span", "blocks"), [(16, 16, 4), (48, 64, 1), (64, 16, 1)])
def test_a_mass_is_the_logarithm_of_all_its_tokens_powers(device, size, span, blocks):
    """Piece by piece or at once, and wherever the block lies in a tile."""
    generator = torch.Generator().manual_seed(size)
    query, keys = (torch.randn(n, 24, generator=generator) for n in (16, 5 * size))
    ids = torch.tensor([3, 1, 4, 0][:blocks], dtype=torch.int32)
    out = torch.empty(16, blocks, device=device)
    _masses[(1,)](
        query.to(device), keys.to(device), ids.to(device), out, blocks, 5, size, span, blocks, 24,
        32, interpreting(),
    )  # fmt: skip
    dots = (query.double() @ keys.double().T).unflatten(-1, (5, size)) * 0.5
    want = (2.0**dots).sum(-1).log2()[:, ids.long()]
    torch.testing.assert_close(out.cpu().double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("heads", "tokens"), [(1, 16), (2, 8), (3, 8), (16, 8), (71, 1)])
def test_a_program_of_few_tokens_has_16_vectors_or_more(heads, tokens):
    query = torch.empty(1, heads, 4, 128, dtype=torch.bfloat16)
    form = Form.of(query, 1, 64, 8)
    assert form.columns // form.room == tokens
    assert Form.of(query, 1, 64).columns == 128
