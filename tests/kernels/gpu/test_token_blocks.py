from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels.gpu import token_blocks


@pytest.mark.parametrize("tokens", [1, 4, 8, 32, 64])
@pytest.mark.parametrize("groups", [1024, 4, 1])
def test_unions_are_what_tiles_of_neighbours_read(device, prompt_case, monkeypatch, tokens, groups):
    """Whether all groups of blocks are looked at together, or a few or one in a turn."""
    monkeypatch.setattr(token_blocks, "_TILE", groups * 32 // min(tokens, 32))
    check_unions(device, prompt_case, tokens)


@pytest.mark.parametrize("tokens", [8, 64])
def test_stores_between_barriers_may_come_in_any_order(
    device, prompt_case, late_stores, monkeypatch, tokens
):
    """Ids are written where the groups were listed that they are read from."""
    monkeypatch.setattr(token_blocks, "_TILE", 4)
    check_unions(device, prompt_case, tokens)


def check_unions(device, prompt_case, tokens):
    mask = [[i % 3 > 0 for i in range(36)], [True] * 36]
    case = prompt_case([50, 3], mask, (2, 1, 4, 8), selected=3)
    staged, paged = case.staged(device)
    kv = (case.k.to(device), case.v.to(device))
    lengths, ids = case.lengths.to(device), case.ids.to(device)
    prompt = token_blocks.pack_prompt(kv, case.numbered(device), lengths, staged, paged)
    assert prompt.totals.tolist() == [50 + 24, 3 + 36]
    tiles = -(-36 // tokens)
    union = token_blocks.unions(prompt, ids, tokens, 0, tiles)
    for row, group, tile in torch.cartesian_prod(*map(torch.arange, (2, 2, tiles))).tolist():
        columns = torch.where(case.mask[row])[0][tile * tokens : (tile + 1) * tokens]
        assert torch.equal(
            prompt.columns[row, tile * tokens :][: len(columns)].cpu(), columns.int()
        )
        own = case.ids[row, group, columns]
        blocks = [block for block in own.unique().tolist() if block >= 0]
        pair = 2 * row + group
        count = int(union.counts[pair, tile])
        assert union.block_ids[pair, tile, :count].tolist() == blocks
        for entry, block in enumerate(blocks):
            words = union.readers[pair, tile].flatten(0)[entry * union.readers.shape[3] :]
            bits = [int(words[t // 32]) >> (t % 32) & 1 for t in range(len(columns))]
            assert bits == (own == block).any(-1).int().tolist()
            check_block(case, prompt, (row, group, block), int(union.slots[pair, tile, entry]))


@pytest.mark.parametrize("tokens", [1, 8, 32])
@pytest.mark.parametrize("spread", [1, 5])
def test_unions_of_columns_are_by_their_own_order(device, tokens, spread):
    """With none here and there; a column may stand for several positions."""
    generator = torch.Generator().manual_seed(tokens)
    batch, groups, num_tokens, selected = 2, 2, 45, 3
    lengths = torch.tensor([70, 0], dtype=torch.int32)
    ids = torch.full((batch, groups, num_tokens, selected), -1, dtype=torch.int32)
    for row, group, token in torch.cartesian_prod(
        torch.arange(batch), torch.arange(groups), torch.arange(num_tokens)
    ).tolist():
        last = (int(lengths[row]) + token * spread) // 16
        if token % 7 != 2 and last >= selected:
            ids[row, group, token] = torch.randperm(last + 1, generator=generator)[
                :selected
            ].sort()[0]
    num_blocks = int(ids.max()) + 1
    first, tiles = (1, 2) if tokens == 8 else (0, -(-num_tokens // tokens))
    union = token_blocks.listed_unions(
        ids.to(device), lengths.to(device), (num_blocks, 16, spread), (tokens, first, tiles)
    )
    for row, group, tile in torch.cartesian_prod(*map(torch.arange, (2, 2, tiles))).tolist():
        own = ids[row, group, (first + tile) * tokens : (first + tile + 1) * tokens]
        blocks = [block for block in own.unique().tolist() if block >= 0]
        pair, count = 2 * row + group, len(blocks)
        assert union.counts[pair, tile] == count
        for found in (union.block_ids, union.slots):
            assert found[pair, tile, :count].tolist() == blocks
        for word, block in zip(union.readers[pair, tile, :count, 0].tolist(), blocks, strict=True):
            bits = [word >> t & 1 for t in range(len(own))]
            assert bits == (own == block).any(-1).int().tolist()


def check_block(case, prompt, which, slot):
    """A slot has the block's tokens, and zeros behind them."""
    row, group, block = which
    page = int(case.table[row, group, block])
    new = block - int(case.lengths[row]) // case.size
    if new >= 0:
        assert slot == new
    got = prompt.staging[row, group, slot].cpu()
    start = block * case.size
    for offset in range(case.size):
        position = start + offset
        if position < case.lengths[row]:
            source = case.pages[row, group, page] if page >= 0 else case.host[row, group, block]
            want = source[:, offset]
        else:
            column = torch.where(case.position[row] == position)[0]
            if len(column) == 0:
                want = torch.zeros(2, got.shape[-1])
            else:
                want = torch.stack([t[row, group, column[0]] for t in (case.k, case.v)])
        assert torch.equal(got[:, offset], want)
