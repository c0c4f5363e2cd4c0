from __future__ import annotations

import pytest
import torch
from picked import first

from sparda_compile.kernels import workspace
from sparda_compile.kernels.gpu import attend_tokens as kernels
from sparda_compile.kernels.prefill_attention import attend_tokens, prefill_attention
from sparda_compile.registry import KV_FORMATS
from sparda_compile.runtime.staging import stage_blocks

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def wanted(case, scale, softcap):
    """Return what the reference makes of the same numbers in fp32."""
    plain = [t.float().nan_to_num() for t in (case.query, case.k, case.v)]
    pages, host = case.pages.float().nan_to_num(), case.host.float().nan_to_num()
    num_past = int(case.lengths.max())
    staged = stage_blocks(case.ids, case.lengths, pages, host, case.table, num_past)
    known = (case.ids, case.numbered("cpu"), case.lengths)
    return attend_tokens(*plain, *known, *staged, pages, case.table, scale, softcap)


def attended(case, device, scale=0.3, softcap=0.0, rows=0):
    new = [t.to(device) for t in (case.query, case.k, case.v, case.ids)]
    query, k, v, ids = new
    out = kernels.attend_tokens(
        query, (k, v), ids, case.numbered(device), case.lengths.to(device),
        *case.staged(device), (scale, softcap), rows,
    )  # fmt: skip
    assert out.transpose(1, 2).is_contiguous()
    assert out.dtype == case.dtype
    return out.cpu()


def check(case, device, assert_close, softcap=0.0, rows=0):
    got, want = attended(case, device, 0.3, softcap, rows), wanted(case, 0.3, softcap)
    assert want.isfinite().all()
    for row, mask in enumerate(case.mask):
        if mask.any():
            assert_close(got[row][None, :, mask], want[row][None, :, mask], "attention", case.dtype)
    assert got[~case.mask[:, None, :, None].expand(got.shape)].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offload", [True, False])
def test_kernels_equal_the_reference(device, assert_close, offload, dtype, prompt_case):
    """Holes behind a past, left padding behind one that ends in a block, no past, and no token."""
    mask = [
        [i % 5 != 1 for i in range(21)],
        [i > 9 for i in range(21)],
        first(21, 21),
        [False] * 21,
    ]
    case = prompt_case([83, 64, 0, 17], mask, (1, 3, 16, 24), dtype=dtype, offload=offload)
    assert offload == bool(((case.table < 0) & case.read).any() and case.host.numel())
    check(case, device, assert_close)


def attended_to_all(case, device, softcap=0.0):
    """Attend to everything before each token, by the kernel and by the reference."""
    new = [t.to(device) for t in (case.query, case.k, case.v, case.mask)]
    query, k, v, mask = new
    case.read[:] = True
    num_past = int(case.lengths.max())
    got = kernels.attend_all(
        query, (k, v), mask, case.lengths.to(device), case.where(device), num_past, (0.3, softcap)
    )
    assert got.transpose(1, 2).is_contiguous()
    plain = [t.float().nan_to_num() for t in (case.query, case.k, case.v)]
    past = [case.pages.float().nan_to_num(), case.host.float().nan_to_num(), case.table]
    want = prefill_attention(
        *plain, case.mask, case.lengths, *past, 0.3, softcap, num_past, may_hide=True
    )
    return got.cpu(), want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize(
    ("lengths", "softcap", "width"),
    [((83, 64, 0, 17), 0.0, 21), ((0, 0, 0, 0), 20.0, 21), ((40, 16, 0, 1), 0.0, 7)],
)
def test_all_blocks_equal_the_reference(
    device, assert_close, prompt_case, lengths, softcap, width, offload, dtype
):
    """Behind pasts of several lengths, and behind none, with holes, padding and no token."""
    holes, padding = [i % 5 != 1 for i in range(width)], [i > 4 for i in range(width)]
    mask = [holes, padding, first(width, width), [False] * width]
    case = prompt_case(list(lengths), mask, (1, 3, 16, 24), dtype=dtype, offload=offload)
    got, want = attended_to_all(case, device, softcap)
    for row, real in enumerate(case.mask):
        if real.any():
            assert_close(got[row][None, :, real], want[row][None, :, real], "attention", dtype)
    assert got[~case.mask[:, None, :, None].expand(got.shape)].eq(0).all()


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize(("name", "dtype"), [("int8", torch.bfloat16), ("int4", torch.float32)])
def test_pages_of_runs_give_the_same_bits(device, prompt_case, case, name, dtype, offload):
    """Behind full blocks and an open one; the older tokens of that come from the tail."""
    found, mask = KV_FORMATS[name], [first(21, 21), [i > 4 for i in range(21)], first(7, 21)]
    prompt = prompt_case([83, 64, 17], mask, (1, 3, 16, 24), dtype=dtype, offload=offload)
    tail = torch.full((3, 1, 2, 2, 16, 24), float("nan"), dtype=dtype)
    for row in (0, 2):
        page = prompt.table[row, 0, int(prompt.lengths[row]) // 16]
        tail[row, 0, 0] = prompt.pages[row, 0, page]
    runs, host = found.pack(prompt.pages), torch.empty(0, device=device)
    rounded = found.rounded(prompt.pages)
    for row in (0, 2):
        page = prompt.table[row, 0, int(prompt.lengths[row]) // 16]
        rounded[row, 0, page] = tail[row, 0, 0]
    if offload:
        prompt.pinned, host = case.memory(found.pack(prompt.host), device)
    new = [t.to(device) for t in (prompt.query, prompt.k, prompt.v, prompt.mask, prompt.lengths)]
    query, k, v, real, lengths = new
    table, both = prompt.table.to(device), []
    for pages, kept in ((rounded, None), (runs, tail.to(device))):
        past = (pages.to(device), host, table)
        both.append(
            kernels.attend_all(
                query, (k, v), real, lengths, past, 83, (0.3, 0.0), name, (), kept
            ).cpu()
        )
    assert both[0].isfinite().all()
    assert torch.equal(*both)


@pytest.mark.parametrize("repeat", [1, 3, 4, 7, 8, 16, 71])
def test_groups_of_every_size(device, assert_close, repeat, prompt_case):
    num_tokens = 2 if repeat > 64 else 7
    case = prompt_case([61], [first(num_tokens, num_tokens)], (2, repeat, 16, 16))
    check(case, device, assert_close, rows=128 if repeat > 64 else 64)


@pytest.mark.parametrize(
    ("size", "dim"), [(4, 12), (8, 16), (48, 96), (64, 64), (64, 128), (128, 128), (128, 256)]
)
def test_head_dims_and_block_sizes(device, assert_close, size, dim, prompt_case):
    case = prompt_case([3 * size + 5], [first(6, 6)], (1, 4, size, dim), selected=3)
    check(case, device, assert_close, rows=16)


@pytest.mark.parametrize(
    ("length", "num_tokens"), [(0, 1), (0, 4), (1, 2), (1, 3), (4, 1), (4, 5), (7, 1), (7, 9)]
)
def test_turns_begin_and_end_anywhere_in_a_block(
    device, assert_close, num_tokens, length, prompt_case
):
    case = prompt_case([length], [first(num_tokens, num_tokens)], (1, 2, 4, 8), selected=2)
    check(case, device, assert_close, rows=16)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_soft_caps(device, assert_close, softcap, prompt_case):
    case = prompt_case([40], [first(9, 9)], (1, 2, 16, 16))
    check(case, device, assert_close, softcap)


def test_tiles_and_launches_change_nothing(device, assert_close, monkeypatch, prompt_case):
    """128 tokens are a tile of a group of 1, and 32 of them a word; or one launch a tile."""
    case = prompt_case([37], [first(40, 40)], (1, 1, 8, 16), selected=5)
    want = wanted(case, 0.3, 0.0)
    for rows in (128, 16):
        assert_close(attended(case, device, rows=rows), want, "attention", torch.float32)
    monkeypatch.setattr(workspace, "UNION_BYTES", 1)
    assert_close(attended(case, device, rows=32), want, "attention", torch.float32)


def test_a_prompt_in_turns_gives_the_same(device, assert_close, prompt_case):
    """The second turn reads as past what the first one read as new."""
    whole = prompt_case([0], [first(29, 29)], (2, 2, 8, 16), selected=3, offload=False)
    turn = prompt_case([19], [first(10, 10)], (2, 2, 8, 16), selected=3, offload=False)
    for name in ("query", "k", "v", "ids"):
        setattr(turn, name, getattr(whole, name)[:, :, 19:])
    kv = torch.stack([whole.k, whole.v], dim=2)[:, :, :, :19]
    for block in range(3):
        tokens = kv[:, :, :, 8 * block : 8 * block + 8]
        for group in range(2):
            page = turn.table[0, group, block]
            turn.pages[0, group, page, :, : tokens.shape[3]] = tokens[0, group]
    got = attended(whole, device)
    assert_close(attended(turn, device), got[:, :, 19:], "attention", torch.float32)


def test_extreme_scores_do_not_overflow(device, prompt_case):
    case = prompt_case([40], [first(9, 9)], (1, 2, 16, 16))
    for scale, softcap in ((100.0, 0.0), (1000.0, 5.0)):
        error = attended(case, device, scale, softcap) - wanted(case, scale, softcap)
        assert error.abs().max() < 1e-2


def test_gaps_between_elements(device, assert_close, prompt_case):
    case = prompt_case([21], [first(9, 9)], (2, 2, 8, 16))
    for name in ("query", "k", "v"):
        tensor = getattr(case, name).repeat_interleave(2, -1)[..., ::2]
        assert tensor.stride(-1) == 2
        setattr(case, name, tensor)
    check(case, device, assert_close)


def test_rows_of_a_tile():
    """A group of 16 heads takes 4 tokens; of very long vectors fewer, of a large group one."""
    assert kernels.tile_rows(16, 128, torch.bfloat16) == 64
    assert kernels.tile_rows(4, 1024, torch.float16) == 32
    assert kernels.tile_rows(71, 512, torch.float16) == 128
    assert kernels.tile_rows(4, 128, torch.float32) == 32


def test_what_is_not_covered():
    pages, table = torch.empty(1, 2, 1, 2, 4, 256), torch.empty(1, 2, 1)
    assert kernels.covers(torch.empty(1, 128, 1, 256), pages, table)
    assert not kernels.covers(torch.empty(1, 142, 1, 256), pages, table)
    assert not kernels.covers(torch.empty(1, 2, 1, 256, dtype=torch.float16), pages, table)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("repeat", "size", "dim", "softcap"),
    [
        (1, 64, 64, 0.0), (4, 64, 96, 30.0), (7, 16, 128, 0.0), (8, 128, 64, 0.0),
        (16, 64, 128, 0.0), (16, 64, 256, 0.0), (4, 64, 128, 0.0),
    ],
)  # fmt: skip
def test_large_shapes(device, assert_close, repeat, size, dim, softcap, dtype, prompt_case):
    """Some hundred tokens of sequences of a hundred blocks, and of none."""
    mask = [first(300, 300), [i % 7 > 0 for i in range(300)], [i > 200 for i in range(300)]]
    lengths = [100 * size + 5, 30 * size, 0]
    case = prompt_case(lengths, mask, (2, repeat, size, dim), selected=24, dtype=dtype)
    check(case, device, assert_close, softcap)
    check(case, device, assert_close, softcap, rows=max(64, 1 << (repeat - 1).bit_length()))
