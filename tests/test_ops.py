"""Every instruction keeps to its schema: declared mutations, fake results, compilation."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sparda_compile import ops
from sparda_compile.graph.emit import propagate
from sparda_compile.graph.pure_part import cut_out
from sparda_compile.graph.side_piece import add_side_piece
from sparda_compile.isa.counters import COUNTERS
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.kernels.sparse_attention import blocks_per_split
from sparda_compile.ops import OPS
from sparda_compile.registry import KV_FORMATS

ROWS, GROUPS, HEADS, DIM, SIZE, BLOCKS, PAGES, SELECTED = 2, 2, 6, 60, 16, 5, 4, 3
# Ops that leave a part of their result to others, so that two results differ.
UNWRITTEN = ("stage_blocks", "select_past")
GEOMETRY = (BLOCKS, SIZE, 8, 4)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def tables():
    """Return block_table, page_block, page_stamp: blocks 0, 4 and 2 are in pages 0, 1 and 3."""
    page_block = int32([0, 4, -1, 2]).expand(ROWS, GROUPS, PAGES).contiguous()
    block_table = int32([0, -1, 3, -1, 1]).expand(ROWS, GROUPS, BLOCKS).contiguous()
    return [block_table, page_block, torch.where(page_block >= 0, 9, -1).int()]


@pytest.fixture(scope="module", autouse=True)
def group():
    """A process group of this process alone, for the ops of several ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def piece():
    """Return the name of a piece that computes x @ weight.T of [ROWS, GROUPS, DIM]."""
    graph = fx.Graph()
    x, weight = (graph.placeholder(name) for name in ("x", "weight"))
    with FakeTensorMode():
        x.meta["val"], weight.meta["val"] = torch.empty(ROWS, GROUPS, DIM), torch.empty(DIM, DIM)
    product = graph.call_function(torch.nn.functional.linear, (x, weight))
    product.meta["val"] = propagate(product)
    return add_side_piece(cut_out([product], [product])).name


def samples():
    """Return arguments of each instruction."""
    lengths = int32([70, 64])
    query, new = randn(ROWS, HEADS, 1, DIM), [randn(ROWS, GROUPS, 1, DIM), randn(2, 2, 1, DIM)]
    prompt = [randn(ROWS, GROUPS, 7, DIM), randn(ROWS, GROUPS, 7, DIM)]
    mask = torch.arange(7) >= torch.tensor([[0], [3]])
    past, earlier = int32([73, 64]), int32([60, 50])
    tokens, from_earlier = (list(number_tokens(mask, n)) for n in (past, earlier))
    ids = int32([0, 1, 4]).expand(ROWS, GROUPS, SELECTED).contiguous()
    page_ids = int32([0, 2, 1]).expand(ROWS, GROUPS, SELECTED).contiguous()
    is_miss = torch.tensor([False, True, False]).expand(ROWS, GROUPS, SELECTED).contiguous()
    tail = int32([[1, 1], [1, 1]])
    pages, host = (
        randn(ROWS, GROUPS, PAGES, 2, SIZE, DIM),
        randn(ROWS, GROUPS, BLOCKS, 2, SIZE, DIM),
    )
    counters = torch.zeros(len(COUNTERS), dtype=torch.int64)
    pooled = [randn(ROWS, GROUPS, 19, DIM), randn(ROWS, GROUPS, 8, DIM)]
    misses = (int32([1, -1, -1]).expand_as(ids).contiguous(), page_ids)
    splits = -(-SELECTED // blocks_per_split(ROWS * GROUPS, SELECTED, SIZE))
    partial = (randn(ROWS, GROUPS, splits, 3, DIM), randn(ROWS, GROUPS, splits, 3))
    parts = (randn(ROWS, GROUPS, SELECTED, 3, DIM), randn(ROWS, GROUPS, SELECTED, 3))
    ticket = torch.empty(0)
    levels = randn(ROWS, GROUPS, BLOCKS) + 1, randn(ROWS, GROUPS, BLOCKS) + 2
    mixed = tuple(randn(ROWS, GROUPS, BLOCKS) for _ in range(3))
    slots = int32([3, 4, -1, 5, -1]).expand(ROWS, GROUPS, BLOCKS).contiguous()
    selection = (query, pages, page_ids, ids)
    guess = int32([0, 2, -1]).expand(ROWS, GROUPS, SELECTED).contiguous()
    runs, packed = (
        torch.zeros(
            ROWS, GROUPS, BLOCKS, *KV_FORMATS[name].stored(SIZE, DIM, pages.dtype)[0]
        ).byte()
        for name in ("int8", "int4")
    )
    stored = (tables()[0], pages, packed, counters)
    scale, softcap = 0.25, 3.0
    return {
        "score_blocks": (query, pooled, lengths, "infllm2", scale, *GEOMETRY),
        "run_piece": (
            [randn(ROWS, GROUPS, DIM), randn(DIM, DIM)], [], [ROWS, GROUPS, DIM], piece(),
        ),
        "select_blocks": (randn(ROWS, GROUPS, BLOCKS), lengths, SELECTED, SIZE, 1, 0),
        "all_blocks": (tables()[0], lengths, SIZE),
        "plan_pages": (ids, lengths, *tables(), counters, SIZE, "lru", False),
        "select_pages": (
            randn(ROWS, GROUPS, BLOCKS), lengths, *tables(), counters, SELECTED, SIZE, 1, 0, "lru",
            False,
        ),
        "fork_stream": ([ids, page_ids], 0),
        "fetch_blocks": (*misses, host, pages),
        "prefetch_blocks": (*misses, host, pages, 1, ticket),
        "wait_blocks": (ticket, [pages], [ids], 1),
        "record_event": ([ids], 3, 2),
        # In a format that rounds, so that pages are written, too.
        "store_blocks": ([], tail, [], int32([79, 64]), None, pages, runs, counters, "int8"),
        "offload_blocks": (prompt, None, tokens, past, *stored, 2, ticket, "int4"),
        "append_kv": (*new, tail, lengths, pages),
        "extend_kv": (
            *prompt, ids[:, :, None].repeat(1, 1, 7, 1), from_earlier, earlier, pages, *tables(),
            1, 1, "lru",
        ),
        "update_summary": (prompt[0], past, tokens, pooled, "pooled_keys", *GEOMETRY),
        "remember_ids": (ids, torch.full_like(ids, -1)),
        "remember_last": (
            ids[:, :, None].repeat(1, 1, 7, 1), tokens[0], torch.full_like(ids, -2),
        ),
        "recall_ids": (ids,),
        "predict_blocks": (
            randn(ROWS, GROUPS, BLOCKS), randn(ROWS, GROUPS, BLOCKS), lengths, SELECTED, SIZE, 1, 0,
            0.5,
        ),
        "predict_ahead": (
            *levels, lengths, int32([2]), torch.full_like(ids, -2), 1, SIZE, 1, 0, 0.5,
        ),
        "attend_predicted": (query, pages, tables()[0], guess, lengths, scale, softcap),
        "repair_predicted": (
            *selection, guess, lengths, *parts, counters, scale, softcap, True,
        ),
        "mix_scores": (*mixed, randn(ROWS, GROUPS, 2).abs(), 0.5, True),
        "learn_mixture": (
            randn(ROWS, GROUPS, BLOCKS), *mixed, lengths, randn(ROWS, GROUPS, 2).abs(), 0.5, True,
            SIZE, 1, 0,
        ),
        "update_prediction": (
            randn(ROWS, GROUPS, BLOCKS), *levels, 0.4, 0.3, True,
        ),
        "begin_prediction": (
            # As many tokens as it takes to calibrate.
            randn(ROWS, HEADS, 17, DIM), pooled,
            *number_tokens(torch.ones(ROWS, 17, dtype=torch.bool), earlier)[1:], earlier, *levels,
            torch.zeros(ROWS, 3), "infllm2", scale, *GEOMETRY, 0.4, 0.3, True, 0, 1, 0, SELECTED,
        ),
        "number_tokens": (mask, past),
        "advance_lengths": (mask, lengths),
        "sparse_attention": (*selection, lengths, scale, softcap),
        "attend_resident": (*selection, is_miss, lengths, scale, softcap),
        "attend_missing": (*selection, is_miss, lengths, *partial, scale, softcap),
        "attend_blocks": (query, pages, page_ids, ids, lengths, scale, softcap),
        "merge_partials": (*parts, torch.tensor([True, False, True]).expand(ROWS, GROUPS, -1)),
        "remove_partial": (parts[0][0], parts[1][0] + 1, parts[0][1], parts[1][1]),
        "prefill_attention": (
            randn(ROWS, HEADS, 7, DIM), *prompt, mask, lengths, pages, host, tables()[0],
            scale, softcap, 70, True,
        ),
        "select_tokens": (
            randn(ROWS, HEADS, 7, DIM), pooled, tokens[0], lengths, 73, "infllm2", scale,
            *GEOMETRY, SELECTED, 1, 0,
        ),
        "select_past": (
            randn(ROWS, GROUPS, 7, DIM), pooled[:1], tokens[0], int32([70, 64]), 70, "forecast",
            1.0, *GEOMETRY, SELECTED, 1, 1,
        ),
        "stage_blocks": (
            ids[:, :, None].repeat(1, 1, 7, 1), lengths, pages, host, tables()[0], 70
        ),
        "attend_tokens": (
            randn(ROWS, HEADS, 7, DIM), *prompt, ids[:, :, None].repeat(1, 1, 7, 1),
            tokens, past, randn(ROWS, GROUPS, 6, 2, SIZE, DIM), slots, pages, tables()[0], scale,
            softcap,
        ),
        "window_attention": (
            randn(ROWS, HEADS, 7, DIM), *prompt, mask, lengths,
            randn(ROWS, GROUPS, 9, DIM), randn(ROWS, GROUPS, 9, DIM), scale, softcap,
        ),
        "all_reduce": (randn(ROWS, 1, DIM), 1, dist.group.WORLD.group_name),
        "all_gather": (randn(SIZE, ROWS), 1, dist.group.WORLD.group_name),
    }  # fmt: skip


def packet(name):
    return getattr(torch.ops.sparda, name).default


def test_every_instruction_has_a_sample():
    assert set(samples()) == set(OPS)


def test_documented_program_names_instructions_only():
    named = set(re.findall(r"\b(\w+)\(", ops.__doc__)) - {"rope", "linear"}
    assert named <= set(OPS)
    assert len(named) > 10


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name not in UNWRITTEN:
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(packet(name), samples()[name], test_utils=checks)


@pytest.mark.parametrize("name", OPS)
def test_only_what_is_declared_is_mutated(name):
    """Sharper than opcheck: of a list, too, and what is declared does change in a sample."""
    args = samples()[name]
    before = tree_map_only(torch.Tensor, torch.clone, args)
    packet(name)(*args)
    changed = set()
    for argument, old, new in zip(packet(name)._schema.arguments, before, args, strict=False):
        if not all(map(same, tree_leaves(old), tree_leaves(new))):
            assert argument.alias_info is not None, argument.name
            changed.add(argument.name)
    declared = {a.name for a in packet(name)._schema.arguments if a.alias_info is not None}
    if name == "wait_blocks":  # what it declares is what the copy that it waits for has written
        assert not changed
    else:
        assert changed == declared


def same(old, new):
    return torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


@pytest.mark.parametrize("name", OPS)
def test_fake_results_have_the_real_metadata(name):
    mode = FakeTensorMode()
    fake_args = tree_map_only(torch.Tensor, mode.from_tensor, samples()[name])
    with mode:
        fake = tree_leaves(packet(name)(*fake_args))
    real = tree_leaves(packet(name)(*samples()[name]))
    assert len(fake) == len(real)
    for one, other in zip(fake, real, strict=True):
        if other is not None:
            assert (one.shape, one.dtype, one.stride()) == (
                other.shape, other.dtype, other.stride(),
            )  # fmt: skip


def step(query, k, v, summary, lengths, table, page_block, page_stamp, counters, host, pages, ring):
    """A decode step of two layers in small, with every kind of mutation in it."""
    op = torch.ops.sparda
    scores = op.score_blocks(query * 2, summary, lengths, "infllm2", 0.25, *GEOMETRY)
    ids = op.select_blocks(scores, lengths, SELECTED, SIZE, 1, 0)
    page_ids, is_miss, blocks, places, tail = op.plan_pages(
        ids, lengths, table, page_block, page_stamp, counters, SIZE, "lru", False
    )
    fork = op.fork_stream([blocks, places], 0)
    ticket = op.prefetch_blocks(blocks, places, host, pages, 1, fork)
    op.append_kv(k, v, tail, lengths, pages)
    op.update_summary(k, lengths, [], summary, "pooled_keys", *GEOMETRY)
    selection = (query, pages, page_ids, ids, is_miss, lengths)
    partial = op.attend_resident(*selection, 0.25, 0.0)
    op.wait_blocks(ticket, [pages], [blocks, places], 1)
    out = op.attend_missing(*selection, *partial, 0.25, 0.0) + 1
    out = op.window_attention(out, k, v, None, lengths, *ring, 0.25, 0.0) * 2
    ticket = op.offload_blocks(
        [], tail, [], lengths, None, pages, host, counters, 3, op.fork_stream([tail], 2)
    )
    op.wait_blocks(ticket, [host], [tail], 3)
    op.advance_lengths(None, lengths)
    return out, ids


def step_arguments():
    new = [randn(ROWS, GROUPS, 1, DIM), randn(2, 2, 1, DIM)]
    summary = [randn(ROWS, GROUPS, 19, DIM), randn(ROWS, GROUPS, 8, DIM)]
    pools = [randn(ROWS, GROUPS, n, 2, SIZE, DIM) for n in (BLOCKS, PAGES)]
    ring = [randn(ROWS, GROUPS, 9, DIM), randn(ROWS, GROUPS, 9, DIM)]
    counters = torch.zeros(5, dtype=torch.int64)
    # Row 0 fills its tail block in this step.
    lengths = int32([79, 71])
    return [randn(ROWS, HEADS, 1, DIM), *new, summary, lengths, *tables(), counters, *pools, ring]


def test_compiled_step_leaves_the_same_state():
    eager, compiled = step_arguments(), step_arguments()
    untouched = step_arguments()
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for want, got in zip(step(*eager), run(*compiled), strict=True):
        assert torch.equal(got, want)
    for name, want, got, before in zip(
        step.__code__.co_varnames, eager, compiled, untouched, strict=False
    ):
        assert all(map(same, tree_leaves(want), tree_leaves(got))), name
        is_state = name not in ("query", "k", "v")
        assert is_state != all(map(same, tree_leaves(want), tree_leaves(before))), name
