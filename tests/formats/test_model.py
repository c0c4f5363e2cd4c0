from __future__ import annotations

import torch

from sparda_compile.formats.model import ModelFormat


def test_blocks_stay_as_they_are(blocks):
    found = ModelFormat()
    for dtype in blocks.dtypes:
        x = blocks.hard(16, 64, dtype)
        assert found.stored(16, 64, dtype) == ((2, 16, 64), dtype)
        assert found.num_bytes(16, 64, dtype) == x[0].nbytes
        assert torch.equal(blocks.read(found, x), x)
        assert not found.bound(x).any()
    assert not found.rounds
