"""Partials of attention against fp64: made, merged in any order, and taken out again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.kernels.partials import (
    MOST_REMOVED,
    attend_blocks,
    block_partials,
    merge,
    merge_partials,
    remove,
    remove_partial,
)

SIZE, DIM, NAN, INF = 16, 20, float("nan"), float("inf")
UNIT = 2.0**-23


class Blocks:
    """Two sequences of some blocks, in pages in order, and what fp64 makes of them."""

    def __init__(self, num_blocks=6, repeat=3, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (2, 2, num_blocks, 2, SIZE, DIM)
        self.pages = torch.randn(shape, generator=generator).to(dtype)
        self.query = torch.randn(2, 2 * repeat, 1, DIM, generator=generator).to(dtype)
        self.lengths = torch.tensor([num_blocks * SIZE - 1, 2 * SIZE + 3], dtype=torch.int32)
        ids = torch.arange(num_blocks, dtype=torch.int32).expand(2, 2, -1).contiguous()
        self.page_ids = ids
        self.block_ids = ids.masked_fill(ids > self.lengths[:, None, None] // SIZE, -1)
        self.pages[1, :, 3:] = NAN
        self.pages[1, :, 2, :, 4:] = NAN

    def parts(self, softcap=0.0):
        ids = (self.page_ids, self.block_ids, self.lengths)
        return attend_blocks(self.query, self.pages, *ids, 0.3, softcap)

    def truth(self, wanted, softcap=0.0):
        """Return fp64 attention to the wanted blocks, [B, G, R, D], and its log-sum-exp."""
        outs, sums = [], []
        for row in range(2):
            for group in range(2):
                length = int(self.lengths[row]) + 1
                kept = [
                    self.pages[row, group, block, :, : max(length - block * SIZE, 0)]
                    for block in wanted
                ]
                keys, values = torch.cat(kept, dim=1).double()
                query = self.query[row].unflatten(0, (2, -1))[group, :, 0].double()
                scores = query @ keys.T * 0.3
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                outs.append(scores.softmax(-1) @ values)
                sums.append(scores.logsumexp(-1))
        return torch.stack(outs).unflatten(0, (2, 2)), torch.stack(sums).unflatten(0, (2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("repeat", "softcap"), [(1, 0.0), (3, 2.0), (16, 0.0)])
def test_each_block_is_attended_to_alone(assert_near, repeat, softcap, dtype):
    """Inputs are taken as they are: what half precision costs is in them, and not added to."""
    case = Blocks(repeat=repeat, dtype=dtype)
    out, lse = case.parts(softcap)
    assert out.dtype == lse.dtype == torch.float32
    assert out.shape == (2, 2, 6, repeat, DIM)
    assert lse.shape == out.shape[:-1]
    for block in range(3):
        wanted, total = case.truth([block], softcap)
        assert_near(out[:, :, block], wanted, torch.float32)
        assert_near(lse[:, :, block], total, torch.float32)
    assert out[1, :, 3:].eq(0).all()
    assert lse[1, :, 3:].eq(-INF).all()


def test_a_block_has_the_same_bits_in_any_company():
    case = Blocks()
    out, lse = case.parts()
    for kept in ([4], [0, 2], [5, 1, 3]):
        case.page_ids, block_ids = case.page_ids[..., kept], case.block_ids
        case.block_ids = block_ids[..., kept]
        some_out, some_lse = case.parts()
        assert torch.equal(some_out, out[:, :, kept])
        assert torch.equal(some_lse, lse[:, :, kept])
        case = Blocks()


def test_merged_blocks_are_attention_to_all_of_them(assert_near):
    case = Blocks()
    out, lse = merge_partials(*case.parts(1.5))
    wanted, total = case.truth(range(6), 1.5)
    assert_near(out, wanted, torch.float32)
    assert_near(lse, total, torch.float32)


def partials(num_partials, seed=0, spread=4.0, shape=(2, 3)):
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(*shape[:-1], num_partials, shape[-1], DIM, generator=generator)
    lse = spread * torch.randn(*shape[:-1], num_partials, shape[-1], generator=generator) + 20
    return out, lse


def exact(out, lse):
    weights = lse.double().softmax(-2)
    return (weights[..., None] * out.double()).sum(-3), lse.double().logsumexp(-2)


def error_bound(out):
    """Return what a merge may be off by: (S + 8) units of the largest partial of a column."""
    return (out.shape[-3] + 8) * UNIT * out.abs().amax(-3)


@given(
    seed=st.integers(0, 1000), num_partials=st.sampled_from([1, 2, 7, 96, 300]),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
)  # fmt: skip
def test_the_order_of_a_merge_matters_by_rounding_alone(seed, num_partials, spread):
    out, lse = partials(num_partials, seed, spread)
    wanted, total = exact(out, lse)
    for order in (torch.arange(num_partials), torch.randperm(num_partials)):
        got, got_lse = merge_partials(out[:, order], lse[:, order])
        assert ((got - wanted).abs() <= error_bound(out)).all()
        assert ((got_lse - total).abs() <= UNIT * (total.abs() + num_partials + 8)).all()
    # In two steps, too: a merge of merges.
    if num_partials > 1:
        halves = [merge_partials(out[:, at], lse[:, at]) for at in order.tensor_split(2)]
        got, _ = merge_partials(*(torch.stack(part, 1) for part in zip(*halves, strict=True)))
        assert ((got - wanted).abs() <= 3 * error_bound(out)).all()


def test_what_does_not_count_may_hold_anything():
    out, lse = partials(9)
    keep = torch.arange(9) % 3 != 1
    keep = torch.stack([keep, keep.roll(1)])
    wanted = [merge(out[row, keep[row]], lse[row, keep[row]]) for row in range(2)]
    out[~keep], lse[~keep] = NAN, NAN
    got = merge_partials(out, lse, keep)
    for row in range(2):
        for mine, its in zip(got, wanted[row], strict=True):
            assert torch.allclose(mine[row], its, rtol=1e-6, atol=1e-6)
    lse[~keep] = -INF  # as a partial of nothing, with the output still unwritten
    assert torch.equal(merge_partials(out, lse)[0], got[0])


def test_a_merge_of_nothing_is_nothing():
    out, lse = partials(4)
    nobody = torch.zeros(2, 4, dtype=torch.bool)
    for parts in (
        merge_partials(out, lse, nobody),
        merge_partials(out, torch.full_like(lse, -INF)),
        merge_partials(out[:, :0], lse[:, :0]),
    ):
        assert parts[0].shape == (2, 3, DIM)
        assert parts[0].eq(0).all()
        assert parts[1].eq(-INF).all()


@pytest.mark.parametrize("unwanted", [[4], [1, 3], [0]])
def test_removal_leaves_attention_to_the_rest(unwanted):
    case = Blocks()
    case.lengths[1] = case.lengths[0]
    case.block_ids, case.pages[1] = case.page_ids, case.pages[0]
    out, lse = case.parts()
    is_gone = torch.zeros(2, 2, 6, dtype=torch.bool)
    is_gone[..., unwanted] = True
    gone = merge_partials(out, lse, is_gone)
    merged = merge_partials(out, lse)
    rest, rest_lse, usable = remove_partial(*merged, *gone, 0.9)
    assert usable.all()
    wanted, total = case.truth([b for b in range(6) if b not in unwanted])
    share = (gone[1].double() - merged[1].double()).exp()
    check_removal((rest, rest_lse), (wanted, total), out.abs().max(), share)


def check_removal(got, wanted, largest, share):
    """Check an error of some units of the largest input, times 1 / (1 - r)."""
    worse = 64 * UNIT / (1 - share)
    assert ((got[0] - wanted[0]).abs() <= (worse * largest)[..., None]).all()
    assert ((got[1] - wanted[1]).abs() <= worse * (1 + wanted[1].abs())).all()


@given(seed=st.integers(0, 1000), heavy=st.sampled_from([-30.0, -2.0, 0.0, 3.0, 60.0]))
def test_removal_is_exact_or_refused(seed, heavy):
    """From what weighs next to nothing to what has all the mass."""
    out, lse = partials(5, seed, 1.0)
    lse[:, 2] += heavy
    merged, gone = merge(out, lse), (out[:, 2], lse[:, 2])
    rest, rest_lse, usable = remove_partial(*merged, *gone)
    share = (gone[1].double() - exact(out, lse)[1]).exp()
    near = (share - MOST_REMOVED).abs() < 1e-4
    assert torch.equal(usable | near, (share <= MOST_REMOVED) | near)
    kept = torch.tensor([0, 1, 3, 4])
    wanted, total = exact(out[:, kept], lse[:, kept])
    got, wanted = ((rest[usable], rest_lse[usable]), (wanted[usable], total[usable]))
    check_removal(got, wanted, out.abs().max(), share[usable])
    assert rest[~usable].eq(0).all()
    assert rest_lse[~usable].eq(-INF).all()


def test_all_of_it_and_nothing_of_it_removed():
    out, lse = merge(*partials(3))
    rest, _, usable = remove_partial(out, lse, out, lse)
    assert not usable.any()
    assert rest.eq(0).all()
    nothing = torch.full_like(out, NAN), torch.full_like(lse, -INF)
    same, same_lse, usable = remove(out, lse, *nothing)
    assert usable.all()
    assert torch.equal(same, out)
    assert torch.equal(same_lse, lse)
    empty = torch.zeros_like(out), torch.full_like(lse, -INF)
    rest, rest_lse, usable = remove(*empty, *nothing)
    assert usable.all()
    assert rest.eq(0).all()
    assert rest_lse.eq(-INF).all()
    _, _, usable = remove(*empty, out, lse)  # more than there is
    assert not usable.any()
    rest, rest_lse, usable = remove_partial(out, lse, out, lse, limit=1.0 - 1e-9)  # 1 in fp32
    assert not usable.any()
    assert rest.eq(0).all()
    assert rest_lse.eq(-INF).all()


def block_arguments(**changes):
    case = Blocks()
    arguments = {
        "query": case.query, "pages": case.pages, "page_ids": case.page_ids,
        "block_ids": case.block_ids, "lengths": case.lengths, "scale": 0.3,
    }  # fmt: skip
    return arguments | {name: change(arguments[name]) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pages", lambda t: t[:, :, :, :1], r"pages has shape .* \[any, any, any, 2, any, any\]"),
        ("pages", lambda t: t.transpose(2, 4).contiguous().transpose(2, 4), "not contiguous"),
        ("pages", torch.Tensor.double, "pages is torch.float64; .* float32 or float16 or bfloat16"),
        ("query", lambda t: t[:, :5], "5 heads, and pages have 2 KV heads"),
        ("query", lambda t: t.expand(-1, -1, 2, -1), r"query has shape \[2, 6, 2, 20\].* 1, 20\]"),
        ("query", torch.Tensor.half, "query is torch.float16; it has to be float32"),
        ("block_ids", torch.Tensor.long, "block_ids is torch.int64; it has to be int32"),
        ("block_ids", lambda t: t[:, :1], r"block_ids has shape \[2, 1, 6\].*\[2, 2, any\]"),
        ("page_ids", lambda t: t[..., :3], r"page_ids has shape \[2, 2, 3\].*\[2, 2, 6\]"),
        ("lengths", lambda t: t[:1], r"lengths has shape \[1\].*\[2\]"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(name, change, message):
    with pytest.raises(UnsupportedInputError, match=message):
        attend_blocks(**block_arguments(**{name: change}))


def test_partials_that_do_not_fit_are_refused():
    out, lse = partials(4)
    for args, message in (
        ((out, lse[0, 0]), r"partial_lse has shape \[3\]; it has to be \[..., S, R\]"),
        ((out[:, :3], lse), r"partial_out has shape \[2, 3, 3, 20\].*\[2, 4, 3, any\]"),
        ((out.half(), lse), "partial_out is torch.float16; it has to be float32"),
        ((out, lse, torch.ones(2, 3, dtype=torch.bool)), r"keep has shape \[2, 3\].*\[2, 4\]"),
        ((out, lse, torch.ones(2, 4)), "keep is torch.float32; it has to be bool"),
    ):
        with pytest.raises(UnsupportedInputError, match=message):
            merge_partials(*args)
    out, lse = merge(out, lse)
    for args, message in (
        ((out, lse[0, 0], out, lse), r"lse has shape \[\]; it has to be \[..., R\]"),
        ((out, lse, out[:1], lse), r"part_out has shape \[1, 3, 20\].*\[2, 3, 20\]"),
        ((out, lse, out, lse[:1]), r"part_lse has shape \[1, 3\].*\[2, 3\]"),
        ((out, lse, out, lse, 1.0), "limit=1.0 is no share"),
        ((out, lse, out, lse, NAN), "limit=nan is no share"),
    ):
        with pytest.raises(UnsupportedInputError, match=message):
            remove_partial(*args)


def test_operands_of_several_devices_are_refused():
    """On the meta device, too, what comes back would be memory that nobody wrote."""
    out, lse = partials(4)
    whole, part = merge(out, lse), merge(out[:, :2], lse[:, :2])
    keep = torch.ones(2, 4, dtype=torch.bool)
    calls = [
        (attend_blocks, tuple(block_arguments().values())),
        (merge_partials, (out, lse, keep)),
        (remove_partial, (*whole, *part)),
    ]
    for op, args in calls:
        for at, arg in enumerate(args):
            if not isinstance(arg, torch.Tensor):
                continue
            mixed = [*args[:at], arg.to("meta"), *args[at + 1 :]]
            with pytest.raises(UnsupportedInputError, match=r"on meta|on cpu, and .* on meta"):
                op(*mixed)


def test_strides_do_not_matter():
    out, lse = partials(4)
    moved = (out.transpose(0, 2).contiguous().transpose(0, 2), lse.mT.contiguous().mT)
    assert not moved[0].is_contiguous()
    for mine, its in zip(merge_partials(*moved), merge_partials(out, lse), strict=True):
        assert torch.equal(mine, its)
        assert mine.is_contiguous()


def test_the_reference_takes_blocks_whose_page_is_unknown():
    case = Blocks()
    page_ids = case.page_ids.masked_fill(case.block_ids < 0, -1)
    args = (case.query, case.pages, page_ids, case.block_ids, case.lengths, 0.3)
    assert torch.equal(block_partials(*args)[0], case.parts()[0])
