"""Speculation against attention to the selected blocks: the same bits whatever was predicted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_compile.isa.counters import COUNTERS, REPAIRED, WASTED
from sparda_compile.isa.table import INSTRUCTIONS
from sparda_compile.kernels import speculation as reference
from sparda_compile.kernels.gpu import partials, speculation
from sparda_compile.kernels.gpu.launch import collect_launches

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN, INF = float("nan"), float("inf")
GUESSES = ["nothing", "some", "all", "others", "more", "ahead"]


class Case:
    """All blocks in pages of any order; some are selected, and NaN is where nobody may read."""

    def __init__(self, device, lengths, selected, sizes, dtype=torch.float32, seed=0):
        self.device, self.dtype = device, dtype
        self.groups, repeat, self.size, dim = sizes
        self.random = torch.Generator().manual_seed(seed)
        batch, num_blocks = len(lengths), max(lengths) // self.size + 2
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        query = torch.randn(batch, 1, self.groups * repeat, dim, generator=self.random)
        self.query = query.to(dtype).transpose(1, 2)
        shape = (batch, self.groups, num_blocks + 1, 2, self.size, dim)
        self.pages = torch.full(shape, NAN, dtype=dtype)
        self.table = torch.full((batch, self.groups, num_blocks), -1, dtype=torch.int32)
        self.block_ids = torch.full((batch, self.groups, selected), -1, dtype=torch.int32)
        self.page_ids = self.block_ids.clone()
        for row, group in self.pairs():
            current = self.current(row)
            order = torch.randperm(num_blocks + 1, generator=self.random)[: current + 1]
            self.table[row, group, : current + 1] = order.int()
            kv = torch.randn(current + 1, 2, self.size, dim, generator=self.random).to(dtype)
            kv[-1, :, lengths[row] % self.size + 1 :] = NAN
            self.pages[row, group, order] = kv
            ids = self.pick(current, selected - 1)
            ids = torch.cat([ids, torch.tensor([current])])
            self.block_ids[row, group, : len(ids)] = ids.int()
            self.page_ids[row, group, : len(ids)] = self.table[row, group, ids]

    def pairs(self):
        return torch.cartesian_prod(torch.arange(len(self.lengths)), torch.arange(self.groups))

    def current(self, row):
        return int(self.lengths[row]) // self.size

    def pick(self, count, most):
        return torch.randperm(count, generator=self.random)[:most].sort().values

    def guess(self, kind, width):
        """Return predicted ids of a kind."""
        predicted = torch.full((*self.block_ids.shape[:2], width), -1, dtype=torch.int32)
        for row, group in self.pairs():
            current, ids = self.current(row), self.block_ids[row, group]
            own = ids[ids >= 0].long()
            rest = torch.tensor(sorted(set(range(current)) - set(own.tolist())), dtype=torch.long)
            picked = {
                "nothing": own[:0],
                "some": torch.cat([own[::2], rest[::3]]),
                "all": own[:-1],
                "others": rest,
                "more": torch.cat([own[:-1], rest]),
                # The block of the new token, and blocks that are not there yet.
                "ahead": torch.cat([own[1::2], torch.tensor([current, current + 1])]),
            }[kind]
            picked = picked.unique()[:width]
            predicted[row, group, : len(picked)] = picked.int()
        return predicted

    def run(self, predicted, softcap=0.0, *, union=False, room=speculation, pages=None):
        """Return the result, the partials, and blocks repaired and wasted."""
        pages = self.pages if pages is None else pages
        where = "cpu" if room is reference else self.device
        counters = torch.zeros(len(COUNTERS), dtype=torch.int64)
        query, pages, table, predicted, lengths, pages_at, ids, counters = (
            tensor.to(where)
            for tensor in (
                self.query, pages, self.table, predicted, self.lengths, self.page_ids,
                self.block_ids, counters,
            )
        )  # fmt: skip
        chosen = (pages_at, ids, predicted)
        if room is reference:
            early = (query.float(), pages.float(), table, predicted, lengths, 0.2, softcap)
            partial = reference.attend_predicted(*early)
            repair = (*early[:2], *chosen, lengths, *partial, counters, 0.2, softcap, union)
            out = reference.repair_predicted(*repair)
        else:
            shape = (*predicted.shape, query.shape[1] // self.groups)
            partial = query.new_empty((*shape, query.shape[-1]), dtype=torch.float32).fill_(NAN)
            partial = (partial, partial.new_empty(shape))
            early = (query, pages, table, predicted, lengths, 0.2, softcap, partial)
            speculation.attend_predicted(*early)
            repair = (lengths, partial, counters, (0.2, softcap))
            out = speculation.repair_predicted(query, pages, chosen, *repair, union=union)
        counts = counters.tolist()
        return out.cpu(), [t.cpu() for t in partial], (counts[REPAIRED], counts[WASTED])

    def poisoned(self):
        """Return pages with NaN in all that are not selected."""
        pages = torch.full_like(self.pages, NAN)
        for row, group in self.pairs():
            at = self.page_ids[row, group]
            at = at[at >= 0].long()
            pages[row, group, at] = self.pages[row, group, at]
        return pages


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("union", "softcap"), [(False, 0.0), (False, 3.0), (True, 3.0)])
def test_kernels_equal_the_reference(device, assert_close, union, softcap, dtype):
    case = Case(device, [16 * 4 + 3, 16 * 9 + 15], 6, (2, 3, 16, 24), dtype)
    for kind in ("some", "more"):
        predicted = case.guess(kind, 9)
        got, partial, counts = case.run(predicted, softcap, union=union)
        want, wanted, both = case.run(predicted, softcap, union=union, room=reference)
        assert got.dtype == dtype
        assert counts == both
        assert counts[1] > 0
        assert_close(got, want, "attention", dtype)
        there = wanted[1] > -INF
        assert torch.equal(partial[1] > -INF, there)
        assert_close(partial[0][there], wanted[0][there], "attention", dtype)


def check_guesses(case, softcap=0.0, width=None, kinds=GUESSES):
    """Check that no guess changes a bit, with NaN in what is not selected, and the counts."""
    width = width or case.table.shape[-1]
    pages = case.poisoned()
    want, *_ = case.run(case.guess("nothing", 1), softcap)
    assert want.isfinite().all()
    for kind in kinds:
        predicted = case.guess(kind, width)
        got, _, counts = case.run(predicted, softcap, pages=pages)
        assert torch.equal(got, want), kind
        assert counts == counted(case, predicted)


def counted(case, predicted):
    """Return how many blocks are repaired and how many predicted in vain, by sets."""
    repaired = wasted = 0
    for row, group in case.pairs():
        early = {i for i in predicted[row, group].tolist() if 0 <= i < case.current(row)}
        ids = {i for i in case.block_ids[row, group].tolist() if i >= 0}
        repaired += len(ids - early)
        wasted += len(early - ids)
    return repaired, wasted


@settings(max_examples=4)
@given(
    seed=st.integers(0, 1000), softcap=st.sampled_from([0.0, 4.0]),
    dtype=st.sampled_from(DTYPES), repeat=st.sampled_from([1, 4, 16]),
)  # fmt: skip
def test_a_prediction_changes_no_bit(device, seed, softcap, dtype, repeat):
    check_guesses(Case(device, [16 * 9 + 4], 5, (1, repeat, 16, 16), dtype, seed), softcap)


@pytest.mark.parametrize(
    ("size", "dim"), [(16, 64), (48, 20), (128, 128), (64, 256), (32, 96), (64, 60)]
)
def test_head_dims_and_block_sizes(device, assert_close, size, dim):
    """Blocks of one tile and of many, and vectors that are padded."""
    case = Case(device, [size * 4 + 1, size - 1], 3, (1, 3, size, dim))
    predicted = case.guess("some", 4)
    want, *_ = case.run(predicted, room=reference)
    assert_close(case.run(predicted)[0], want, "attention", torch.float32)
    check_guesses(case, kinds=("some", "more"))


@pytest.mark.parametrize("selected", [1, 5])
def test_ends_of_sequences_and_fewer_blocks_than_wanted(device, assert_close, selected):
    """One token, two, a full block, and one token of a new block."""
    case = Case(device, [0, 1, 15, 16, 63], selected, (1, 2, 16, 16))
    want, *_ = case.run(case.guess("some", 3), room=reference)
    assert_close(case.run(case.guess("some", 3))[0], want, "attention", torch.float32)
    check_guesses(case)


@pytest.mark.parametrize("programs", [1, 4])
def test_runs_of_many_blocks(device, assert_close, monkeypatch, programs):
    """As where there are more blocks than programs: each takes some, and ids are many tiles."""
    case = Case(device, [16 * 24 + 3], 13, (1, 2, 16, 16))
    monkeypatch.setattr(partials, "_PROGRAMS_AT_ONCE", programs)
    monkeypatch.setattr(speculation, "_COMPARED", 8)
    monkeypatch.setattr(partials, "_MERGE_TILE", 8 * 32)
    check_guesses(case)
    for union in (False, True):
        predicted = case.guess("some", 15)
        want, _, counts = case.run(predicted, union=union, room=reference)
        got, _, both = case.run(predicted, union=union)
        assert counts == both
        assert_close(got, want, "attention", torch.float32)


def test_how_blocks_are_shared_out_changes_no_bit(device, monkeypatch):
    case = Case(device, [16 * 12 + 3], 7, (1, 3, 16, 16))
    want, partial, _ = case.run(case.guess("some", 12))
    for programs in (2, 6):
        monkeypatch.setattr(partials, "_PROGRAMS_AT_ONCE", programs)
        got, other, _ = case.run(case.guess("some", 12))
        assert torch.equal(got, want)
        assert torch.equal(partial[1], other[1])


def test_nothing_selected_is_nothing(device):
    case = Case(device, [70, 3], 3, (1, 2, 16, 16))
    case.block_ids.fill_(-1)
    for union in (False, True):
        got, *_ = case.run(case.guess("nothing", 4), union=union)
        assert got.eq(0).all()


@pytest.mark.parametrize("union", [False, True])
def test_what_a_repair_takes_beside_its_result(device, union):
    """Its partials, and where each partial to be merged comes from: what its kernels are given."""
    case = Case(device, [70, 3], 3, (1, 2, 16, 16))
    predicted, counters = case.guess("some", 4), torch.zeros(len(COUNTERS), dtype=torch.int64)
    shape = (*predicted.shape, 2)
    partial = torch.zeros(*shape, 16), torch.zeros(shape)
    ids = (case.page_ids, case.block_ids, predicted)
    given = (case.query, case.pages, *ids, case.lengths, *partial, counters, 0.2, 0.0, union)
    with collect_launches() as launches:
        speculation.repair_predicted(
            *given[:2], ids, case.lengths, partial, counters, (0.2, 0.0), union=union
        )
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names == list(INSTRUCTIONS["repair_predicted"].kernels)
    known = {tensor.data_ptr() for tensor in given if isinstance(tensor, torch.Tensor)}
    scratch = {
        tensor.data_ptr(): tensor.nbytes
        for tensor in launches[0].args
        if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in known
    }
    assert sum(scratch.values()) == INSTRUCTIONS["repair_predicted"].workspace(*given)


@pytest.mark.parametrize(
    ("pairs", "entries", "run"),
    # One program a block while all run at once; then as many as do; and not too long.
    [
        (2, 96, 1),
        (2, 192, 2),
        (8, 96, 3),
        (32, 96, 12),
        (32, 192, 24),
        (128, 96, 48),
        (128, 192, 64),
        (300, 96, 64),
        (1, 1, 1),
    ],
)
def test_runs_fill_the_gpu(pairs, entries, run):
    assert partials.run_length(pairs, entries) == run


# The sizes of the model, and others.
LARGE = [
    (batch, groups, repeat, 64, 128, dtype, softcap)
    for dtype in (torch.bfloat16, torch.float16)
    for batch, groups, repeat, softcap in [
        (1, 2, 16, 0.0), (1, 8, 4, 0.0), (4, 2, 16, 0.0), (16, 2, 16, 0.0), (16, 8, 4, 30.0),
    ]
] + [
    (2, 2, 1, 16, 64, torch.bfloat16, 0.0), (2, 2, 3, 128, 256, torch.float16, 0.0),
    (3, 2, 8, 32, 96, torch.bfloat16, 20.0), (2, 1, 16, 64, 128, torch.float32, 0.0),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "groups", "repeat", "size", "dim", "dtype", "softcap"), LARGE)
def test_large_shapes(device, assert_close, batch, groups, repeat, size, dim, dtype, softcap):
    """96 selected blocks; sequences of 300 blocks and of few tokens."""
    lengths = [300 * size - 1, 200 * size + 5, 0, 90 * size][:batch] + [250 * size] * (batch - 4)
    case = Case(device, lengths, 96, (groups, repeat, size, dim), dtype)
    for width in (96, 192):
        check_guesses(case, softcap, width)
    for union in (False, True):
        predicted = case.guess("some", 192)
        want, _, counts = case.run(predicted, softcap, union=union, room=reference)
        got, _, both = case.run(predicted, softcap, union=union)
        assert counts == both
        assert_close(got, want, "attention", dtype)
