"""What tokens of a prompt have selected of the past, side by side; nothing else is copied."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.isa.engines import DeferredEngine, current_engine, use_engine
from sparda_compile.isa.streams import COMPUTE, COPY
from sparda_compile.runtime.staging import stage_blocks

SIZE, GROUPS, BLOCKS, PAGES = 4, 2, 9, 5
LENGTHS = (30, 8, 3, 0)
LONGEST = max(LENGTHS)


class Past:
    """Blocks whose numbers say which they are; NaN where nothing may be read."""

    def __init__(self, *, offload=True):
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32)
        rows = len(LENGTHS)
        number = torch.arange(rows * GROUPS * BLOCKS).view(rows, GROUPS, BLOCKS, 1, 1, 1)
        self.blocks = number + torch.rand(2, SIZE, 3)
        self.table = torch.full((rows, GROUPS, BLOCKS), -1, dtype=torch.int32)
        num_pages = PAGES if offload else BLOCKS
        self.pages = torch.full((rows, GROUPS, num_pages, 2, SIZE, 3), float("nan"))
        self.host = self.blocks.clone() if offload else torch.empty(0)
        for block in range(0, BLOCKS, 2 if offload else 1):
            page = num_pages - 1 - block // 2 if offload else BLOCKS - 1 - block
            self.table[:, :, block] = page
            self.pages[:, :, page] = self.blocks[:, :, block]
            if offload:
                self.host[:, :, block] = float("nan")

    def stage(self, ids, num_past=LONGEST):
        return stage_blocks(ids, self.lengths, self.pages, self.host, self.table, num_past)


def selected(num_tokens, *blocks):
    ids = torch.tensor(blocks, dtype=torch.int32)
    return ids.expand(len(LENGTHS), GROUPS, num_tokens, len(blocks)).contiguous()


@pytest.mark.parametrize("offload", [True, False])
def test_each_past_block_that_is_read_has_a_slot(offload):
    past = Past(offload=offload)
    ids = selected(5, 1, -1, 4, 7)
    ids[0, 1, 3] = torch.tensor([0, 1, 2, 6])
    staging, slots = past.stage(ids)
    # Five tokens lie in three blocks of four at most; seven blocks of the past are whole.
    assert staging.shape[2] == 3 + 7
    assert slots[0, 0].tolist() == [-1, 3, -1, -1, 4, -1, -1, -1, -1]
    assert slots[0, 1].tolist() == [3, 4, 5, -1, 6, -1, 7, -1, -1]
    # The second sequence has two whole blocks, the others none: what they read has new tokens.
    assert slots[1].tolist() == [[-1, 3, *[-1] * 7]] * 2
    assert slots[2:].eq(-1).all()
    row, head, block = torch.where(slots >= 0)
    got = staging[row, head, slots[row, head, block].long()]
    assert torch.equal(got, past.blocks[row, head, block])
    unwritten = torch.ones(staging.shape[:3], dtype=torch.bool)
    unwritten[row, head, slots[row, head, block].long()] = False
    assert staging[unwritten].isnan().all()


@pytest.mark.parametrize(
    ("num_past", "num_tokens", "room"), [(0, 5, 0), (3, 5, 0), (30, 5, 7), (31, 1, 2), (32, 2, 4)]
)
def test_room_is_for_the_past_blocks_or_for_what_tokens_select(num_past, num_tokens, room):
    past = Past()
    past.lengths = past.lengths.clamp(max=num_past)
    staging, slots = past.stage(selected(num_tokens, 0, 5), num_past)
    assert staging.shape[2] == -(-num_tokens // SIZE) + 1 + room
    if room:
        assert (slots >= 0).any()


@pytest.mark.parametrize("stream", [COMPUTE, COPY])
def test_it_is_done_where_its_stream_says(stream):
    past = Past()
    ids = selected(5, 1, 4)
    with use_engine(DeferredEngine()) as engine:
        staging, slots = stage_blocks(
            ids, past.lengths, past.pages, past.host, past.table, 30, stream
        )
        assert engine.num_pending == (stream == COPY)
        current_engine().record(0, COPY)
        current_engine().wait(0)
    assert torch.equal(staging[0, 0, slots[0, 0, 4]], past.blocks[0, 0, 4])
