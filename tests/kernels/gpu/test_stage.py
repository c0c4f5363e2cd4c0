from __future__ import annotations

import pytest
import torch

from sparda_compile.runtime.staging import stage_blocks

MASK = [[i % 3 > 0 for i in range(36)], [True] * 36, [False] * 36]


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("sizes", [(2, 1, 4, 8), (3, 2, 16, 12), (1, 1, 128, 256)])
def test_kernels_equal_the_reference(device, prompt_case, sizes, offload):
    case = prompt_case(
        [9 * sizes[2] + 3, 3, 5 * sizes[2]], MASK, sizes, selected=3, offload=offload
    )
    (staging, slots), _ = case.staged(device)
    want, want_slots = stage_blocks(
        case.ids, case.lengths, case.pages, case.host, case.table, int(case.lengths.max())
    )
    assert torch.equal(slots.cpu(), want_slots)
    assert (want_slots >= 0).any()
    filled = want.isfinite().all(-1).all(-1).all(-1)
    assert torch.equal(staging.cpu()[filled], want[filled])
    # Nothing else is copied: the buffer is NaN where nothing has been written.
    assert staging.cpu()[~filled].isnan().all()
    assert torch.equal(filled.sum(-1), (want_slots >= 0).sum(-1))


def test_nothing_but_missed_blocks_crosses_the_link(device, prompt_case):
    """Blocks in CPU memory that nobody reads, or that have a page, are NaN there."""
    case = prompt_case([50, 3], MASK[:2], (2, 1, 4, 8), selected=3)
    has_page = (case.table >= 0)[..., None, None, None]
    case.host = case.host.masked_fill(has_page, float("nan"))
    (staging, slots), _ = case.staged(device)
    row, head, block = torch.where(slots.cpu() >= 0)
    assert ((case.table < 0) & case.read)[row, head, block].any()
    assert staging.cpu()[row, head, slots.cpu()[row, head, block].long()].isfinite().all()


def test_many_blocks_of_many_sequences(device, prompt_case):
    """More blocks than a program takes in at once."""
    case = prompt_case([0], [[True] * 4], (2, 1, 4, 4), selected=2)
    batch, num_blocks, length = 3, 2100, 8300
    generator = torch.Generator().manual_seed(1)
    case.lengths = torch.tensor([length, 8211, 7], dtype=torch.int32)
    case.ids = torch.randint(-1, 2000, (batch, 2, 900, 2), generator=generator).int()
    case.pages = torch.randn(batch, 2, 50, 2, 4, 4, generator=generator)
    case.host = torch.randn(batch, 2, num_blocks, 2, 4, 4, generator=generator)
    case.table = torch.randint(-40, 50, (batch, 2, num_blocks), generator=generator).int()
    case.read = torch.ones(batch, 2, num_blocks, dtype=torch.bool)
    (staging, slots), _ = case.staged(device)
    want, want_slots = stage_blocks(
        case.ids, case.lengths, case.pages, case.host, case.table, length
    )
    assert torch.equal(slots.cpu(), want_slots)
    filled = want.isfinite().all(-1).all(-1).all(-1)
    assert torch.equal(staging.cpu()[filled], want[filled])
