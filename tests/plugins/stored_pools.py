"""Two sequences in both kinds of pages, and in CPU memory."""

from __future__ import annotations

import torch

from sparda_compile.kernels.paged import WRITTEN
from sparda_compile.registry import KV_FORMATS

SIZE, DIM, GROUPS, BLOCKS = 16, 8, 2, 5
LENGTHS = torch.tensor([4 * SIZE + 3, 2 * SIZE], dtype=torch.int32)


class Pools:
    """Blocks of two sequences: some on pages, all that are full in CPU memory."""

    def __init__(self, name):
        found, generator = KV_FORMATS[name], torch.Generator().manual_seed(0)
        blocks = torch.randn(2, GROUPS, BLOCKS, 2, SIZE, DIM, generator=generator)
        self.host, self.blocks = found.pack(blocks), found.rounded(blocks)
        self.tail = torch.full((2, GROUPS, 2, 2, SIZE, DIM), float("nan"))
        self.tail[:, :, WRITTEN] = blocks[:, :, 4]
        self.blocks[0, :, 4] = blocks[0, :, 4]  # which is open
        self.table = torch.tensor([2, -1, 0, -1, 1], dtype=torch.int32).expand(2, GROUPS, BLOCKS)
        self.runs = self.host[:, :, [2, 0, 0]].clone()
        self.runs[:, :, 1] = 255  # the page that the open block has
        self.pages = self.blocks[:, :, [2, 4, 0]]
