from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.formats.base import BlockFormat
from sparda_compile.registry import KV_FORMATS
from sparda_compile.testing import tiny_llama

if TYPE_CHECKING:
    from torch import Tensor

SMALL = {"block_size": 16, "pool_size": 8, "pool_stride": 4, "local_blocks": 1, "top_k": 2}


class Halves(BlockFormat):
    """Bits of a float32 that are cut off: a format that a user may write."""

    name: ClassVar[str] = "halves"

    def stored(self, size, dim, dtype):
        del dtype
        return (2, size, dim), torch.bfloat16

    def pack(self, blocks: Tensor) -> Tensor:
        return blocks.bfloat16()

    def unpack(self, stored: Tensor, size: int, dim: int, dtype: torch.dtype) -> Tensor:
        del size, dim
        return stored.to(dtype)

    def bound(self, blocks: Tensor) -> Tensor:
        return blocks.abs().float() * 2.0**-8


def test_a_format_of_ones_own_is_one_class():
    """Nothing else has to be changed for it, on a CPU."""
    KV_FORMATS.add(Halves())
    try:
        ids = torch.randint(0, 256, (2, 90), generator=torch.Generator().manual_seed(0))
        config = SpardaConfig(mode="query", lowering="eager", kv_format="halves", **SMALL)
        fast = optimize(tiny_llama(), config)
        resident = optimize(fast, config.replace(offload="never"))
        exact = optimize(fast, config.replace(kv_format="model"))
        settings = {"max_new_tokens": 40, "output_logits": True, "return_dict_in_generate": True}
        one, other, model = (each.generate(ids, **settings) for each in (fast, resident, exact))
        assert torch.equal(torch.stack(one.logits), torch.stack(other.logits))
        assert not torch.equal(torch.stack(one.logits), torch.stack(model.logits))
        moved = [each.sparda.stats().total.d2h_bytes for each in (fast, exact)]
        assert moved[0] * 2 == moved[1] > 0
    finally:
        KV_FORMATS.remove("halves")


@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "values8", "values4"])
def test_other_dtypes_are_refused(name):
    with pytest.raises(UnsupportedInputError, match=rf"kv_format='{name}'.*float64.*'model'"):
        KV_FORMATS[name].stored(16, 64, torch.float64)


def test_blocks_of_any_lead_have_runs_of_their_own(blocks):
    for found in KV_FORMATS:
        x = blocks.plain(16, 24, torch.bfloat16)
        many = torch.stack([x, x * 2]).transpose(0, 1)
        y = found.rounded(many)
        assert torch.equal(y[:, 0], blocks.read(found, x))
        assert torch.equal(y[:, 1], blocks.read(found, x) * 2)
