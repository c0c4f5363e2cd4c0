"""What kernels of packed blocks are compiled for."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.formats.int8 import Int8Format
from sparda_compile.kernels.gpu.packed_form import Form, functions_of
from sparda_compile.registry import KV_FORMATS

PACKED = [found.name for found in KV_FORMATS if found.kernels]


def form(name, size, dim, dtype=torch.bfloat16):
    return Form.of(torch.empty(1, 1, 1, 2, size, dim, dtype=dtype, device="meta"), name)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("size", "dim"), [(16, 8), (48, 96), (64, 128), (128, 256)])
def test_a_tile_of_a_gather_is_a_whole_part_of_a_block(name, size, dim):
    found = form(name, size, dim)
    assert found.slots % found.tokens == 0
    assert found.tokens * found.bits % 8 == 0  # no byte is cut
    least = 8 // found.bits
    assert found.tokens * found.dims * found.bits // 8 <= 4096 or found.tokens == least
    assert found.run == KV_FORMATS[name].num_bytes(size, dim, torch.bfloat16)
    assert 1 <= found.gather_warps <= found.num_warps <= 16


def test_tiles_hold_four_kib_of_codes():
    assert form("int8", 64, 128).tokens == 32
    assert form("int4", 64, 128).tokens == 64
    assert form("int8", 64, 64).tokens == 64


def test_head_dims_that_are_no_whole_words_are_refused():
    with pytest.raises(UnsupportedInputError, match=r"kv_format='int8'.*multiples of 4.*is 18"):
        form("int8", 16, 18)


@pytest.mark.parametrize("name", PACKED)
def test_each_format_has_both_functions(name):
    functions = functions_of(name)
    assert callable(functions.encode.fn)
    assert callable(functions.decode.fn)


def test_a_format_without_kernels_is_refused():
    class Plain(Int8Format):
        name = "plain"
        kernels = None

    KV_FORMATS.add(Plain())
    try:
        with pytest.raises(UnsupportedInputError, match="kv_format='plain' has no kernels"):
            functions_of("plain")
    finally:
        KV_FORMATS.remove("plain")
