from __future__ import annotations

import itertools
import random

import pytest
import torch

from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.kernels.prefill_attention import (
    _causal_of_real,
    attend_tokens,
    masked_attention,
    prefill_attention,
    real_columns,
    token_positions,
)
from sparda_compile.runtime.staging import stage_blocks

SIZE, BLOCKS, PAGES = 16, 5, 4


def truth(query_HTD, k_GSD, v_GSD, past, scale, softcap, window=0):
    """Return causal attention of new tokens behind `past` others, fp64, one token at a time."""
    out = torch.zeros(query_HTD.shape, dtype=torch.float64)
    repeat = query_HTD.shape[0] // k_GSD.shape[0]
    for head in range(query_HTD.shape[0]):
        for t in range(query_HTD.shape[1]):
            first = max(past + t + 1 - window, 0) if window else 0
            keys = k_GSD[head // repeat, first : past + t + 1].double()
            values = v_GSD[head // repeat, first : past + t + 1].double()
            scores = keys @ query_HTD[head, t].double() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[head, t] = scores.softmax(0) @ values
    return out


class Case:
    """Past tokens in pages and on the host, new ones with padding; NaN wherever nothing is."""

    def __init__(self, lengths, num_tokens, padding, *, repeat, dim, dtype, offload=True):
        generator = torch.Generator().manual_seed(0)
        rows, self.groups = len(lengths), 2

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.query = randn(rows, self.groups * repeat, num_tokens, dim)
        self.k, self.v = randn(2, rows, self.groups, num_tokens, dim)
        self.past = randn(2, rows, self.groups, BLOCKS * SIZE, dim)
        self.mask = torch.arange(num_tokens) >= torch.tensor(padding)[:, None]
        num_pages = PAGES if offload else BLOCKS
        self.pages = randn(rows, self.groups, num_pages, 2, SIZE, dim).fill_(float("nan"))
        self.host = randn(rows, self.groups, BLOCKS, 2, SIZE, dim).fill_(float("nan"))
        self.table = torch.full((rows, self.groups, BLOCKS), -1, dtype=torch.int32)
        for row, length in enumerate(lengths):
            for group in range(self.groups):
                order = torch.randperm(num_pages, generator=generator).tolist()
                for block in range(-(-length // SIZE)):
                    seen = min(SIZE, length - block * SIZE)
                    kv = self.past[:, row, group, block * SIZE : block * SIZE + seen]
                    if not offload or seen < SIZE or block % 2:
                        page = order.pop()
                        self.table[row, group, block] = page
                        self.pages[row, group, page, :, :seen] = kv
                    if seen == SIZE:
                        self.host[row, group, block] = kv
        if not offload:
            self.host = self.host.new_empty(0)

    def attend(self, softcap, more=0, may_hide=True):
        return prefill_attention(
            self.query, self.k, self.v, self.mask, self.lengths, self.pages, self.host,
            self.table, 0.3, softcap, max(self.lengths.tolist()) + more, may_hide,
        )  # fmt: skip

    def attend_selected(self, ids, softcap):
        num_past = max(self.lengths.tolist())
        past = (self.pages, self.host, self.table)
        staged = stage_blocks(ids, self.lengths, *past, num_past)
        return attend_tokens(
            self.query, self.k, self.v, ids, number_tokens(self.mask, self.lengths), self.lengths,
            *staged, self.pages, self.table, 0.3, softcap,
        )  # fmt: skip

    def check(self, got, softcap, assert_near):
        for row, length in enumerate(self.lengths.tolist()):
            real = self.mask[row]
            keys = torch.cat([self.past[0, row, :, :length], self.k[row][:, real]], dim=1)
            values = torch.cat([self.past[1, row, :, :length], self.v[row][:, real]], dim=1)
            want = truth(self.query[row][:, real], keys, values, length, 0.3, softcap)
            if real.any():
                assert_near(got[row][:, real], want, got.dtype)
            assert got[row][:, ~real].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "num_tokens", "padding", "repeat", "dim", "softcap"),
    [
        ([0], 1, [0], 1, 16, 0.0),
        ([0, 0], 19, [0, 0], 3, 60, 0.0),
        ([0, 0], 19, [0, 7], 7, 60, 0.0),
        ([0, 0], 19, [0, 0], 1, 16, 2.0),
        ([37, 5], 9, [0, 4], 3, 60, 0.0),
        ([64, 0], 3, [0, 2], 7, 16, 3.0),
        ([33, 48], 4, [4, 0], 1, 16, 0.0),
    ],
)
@pytest.mark.parametrize("offload", [True, False])
def test_attention_is_causal_over_past_and_new(
    assert_near, lengths, num_tokens, padding, repeat, dim, softcap, dtype, offload
):
    case = Case(lengths, num_tokens, padding, repeat=repeat, dim=dim, dtype=dtype, offload=offload)
    got = case.attend(softcap)
    assert got.dtype == dtype
    assert got.transpose(1, 2).is_contiguous()  # as the next projection reads it
    case.check(got, softcap, assert_near)


@pytest.mark.parametrize("more", [1, 30, BLOCKS * SIZE - 48])
def test_a_caller_may_know_no_better_bound_of_the_past(assert_near, more):
    """What lies behind a sequence's end is read then, NaN there, and has no weight."""
    case = Case([33, 48], 4, [0, 3], repeat=3, dim=60, dtype=torch.float32)
    case.check(case.attend(0.0, more), 0.0, assert_near)


def test_where_nothing_is_hidden_no_mask_is_read():
    case = Case([0, 0], 19, [0, 0], repeat=3, dim=16, dtype=torch.float32)
    want = case.attend(0.0)
    assert want.transpose(1, 2).is_contiguous()
    case.mask = torch.zeros(2, 0, dtype=torch.bool)
    assert torch.equal(case.attend(0.0, may_hide=False), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_padding_anywhere_takes_the_causal_path(assert_near, dtype):
    """What a GPU does where a mask may hide some: real tokens are moved to the front and back."""
    generator = torch.Generator().manual_seed(1)
    case = Case([0] * 6, 37, [0, 5, 36, 0, 0, 0], repeat=3, dim=16, dtype=dtype)
    case.mask[3] = torch.arange(37) < 9
    case.mask[4] = torch.rand(37, generator=generator) < 0.5
    case.mask[5] = False
    got = _causal_of_real(case.query, case.k, case.v, case.mask, 0.3)
    case.check(got, 0.0, assert_near)
    columns = real_columns(case.mask)
    for row in range(6):
        real = torch.where(case.mask[row])[0]
        assert torch.equal(columns[row, : len(real)], real)


def test_chunks_of_queries_change_nothing(assert_near):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 515, 4, generator=generator)
    k, v = torch.randn(2, 1, 1, 515, 4, generator=generator)
    position = torch.arange(515)[None]
    for window in (0, 100):
        got = masked_attention(query, k, v, position, position, 0.5, 0.0, window)
        want = truth(query[0], k[0], v[0], 0, 0.5, 0.0, window)
        assert_near(got[0], want, torch.float32)


def test_positions_count_real_tokens_behind_the_past():
    lengths = torch.tensor([5, 0], dtype=torch.int32)
    assert token_positions(lengths, None, 2).tolist() == [[5, 6], [0, 1]]
    mask = torch.tensor([[False, True, True, False], [True, False, False, True]])
    assert token_positions(lengths, mask, 4).tolist() == [[-1, 5, 6, -1], [0, -1, -1, 1]]


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(
    ("lengths", "num_tokens", "padding", "repeat"),
    [
        ([0], 19, [0], 1),
        ([37, 5], 9, [0, 4], 3),
        ([33, 48], 20, [19, 0], 7),
        ([64, 0], 3, [0, 2], 2),
    ],
)
def test_each_token_attends_to_its_own_blocks(
    assert_near, lengths, num_tokens, padding, repeat, softcap, offload
):
    """Against dense attention to the tokens of those blocks, one token and group at a time."""
    case = Case(
        lengths, num_tokens, padding, repeat=repeat, dim=16, dtype=torch.float32, offload=offload
    )
    position = token_positions(case.lengths, case.mask, num_tokens)
    ids = torch.full((len(lengths), case.groups, num_tokens, 3), -1, dtype=torch.int32)
    chooser = random.Random(1)
    for row, group, t in itertools.product(range(len(lengths)), range(2), range(num_tokens)):
        current = int(position[row, t]) // SIZE
        if current >= 0:
            picked = chooser.sample(range(current), min(current, 2))
            ids[row, group, t, : len(picked) + 1] = torch.tensor(sorted([*picked, current]))
    got = case.attend_selected(ids, softcap)
    assert got[~case.mask[:, None].expand(got.shape[:3])].eq(0).all()
    for row, length in enumerate(lengths):
        real = case.mask[row]
        keys = torch.cat([case.past[0, row, :, :length], case.k[row][:, real]], dim=1)
        values = torch.cat([case.past[1, row, :, :length], case.v[row][:, real]], dim=1)
        for number, t in enumerate(torch.where(real)[0].tolist()):
            for group in range(2):
                seen = torch.arange(length + number + 1)
                seen = seen[torch.isin(seen // SIZE, ids[row, group, t].long())]
                heads = slice(group * repeat, (group + 1) * repeat)
                want = truth(
                    case.query[row, heads, t, None], keys[None, group, seen],
                    values[None, group, seen], len(seen) - 1, 0.3, softcap,
                )  # fmt: skip
                assert_near(got[row, heads, t, None], want, torch.float32)


def test_all_blocks_are_dense_attention():
    case = Case([37, 5], 9, [0, 4], repeat=2, dim=16, dtype=torch.float32)
    ids = torch.arange(BLOCKS, dtype=torch.int32).expand(2, 2, 9, BLOCKS).contiguous()
    got = case.attend_selected(ids, 0.0)
    torch.testing.assert_close(got, case.attend(0.0))
