"""Expected blocks of copies and of attention, against sums done by hand."""

from __future__ import annotations

import dataclasses

import pytest

from sparda_compile.graph.effects import argument
from sparda_compile.graph.nodes import fake_value, find_ops
from sparda_compile.graph.tags import LAYER
from sparda_compile.passes.base import PassContext
from sparda_compile.passes.machine import MACHINES
from sparda_compile.passes.schedule.cost import Cost, node_cost
from sparda_compile.passes.schedule.expected_blocks import expected_misses
from sparda_compile.registry import HINTS

H200 = MACHINES["h200"]
SETTINGS = {"mode": "forecast", "machine": "h200", "expected_overlap": 0.75, "max_tokens": 131072}
BLOCK_BYTES = 2 * 64 * 16 * 4  # K and V, tokens, head dim, fp32
HEADS = 3 * 2  # batch, KV heads
SELECTED = 96
SCORED = SELECTED - 1 - 32 - 1  # without sinks, local blocks and the one being written
# Of 2,048 blocks 144 have a page: as many of those that are not read as of any.
ABSENT = (2048 - 144) / (2048 - SELECTED)


@pytest.fixture
def decode(plan_of):
    return plan_of("llama", batch_size=3, **SETTINGS)


def context(plan, **changes):
    config = plan.layout.config.replace(**changes)
    layout = dataclasses.replace(plan.layout, config=config)
    batch_size = plan.layout.batch_size
    return PassContext(config, plan.captured.phase, {}, "Model", layout.traced(), H200, batch_size)


def cost(plan, name, **changes):
    node = next(n for n in plan.graph_module.graph.nodes if n.name == name)
    return node_cost(node, context(plan, **changes))


def test_prefetch_moves_the_blocks_that_are_new(decode):
    expected = int(HEADS * SCORED * BLOCK_BYTES * 0.25 * ABSENT)
    assert cost(decode, "prefetch_1") == Cost(2.0 + expected / 50.1e3, 0, expected)


def test_nothing_is_new_where_all_blocks_have_a_page(plan_of):
    """144 pages hold 9,216 tokens."""
    for tokens, fresh in ((9216, 0.0), (18432, (288 - 144) / (288 - SELECTED))):
        plan = plan_of("llama", batch_size=3, **SETTINGS | {"max_tokens": tokens})
        expected = int(HEADS * SCORED * BLOCK_BYTES * 0.25 * fresh)
        assert cost(plan, "prefetch_1").link_bytes == expected


def test_prefetch_of_nothing_is_a_launch(decode):
    assert cost(decode, "prefetch_1", expected_overlap=1.0) == Cost(2.0, 0, 0)
    everything = cost(decode, "prefetch_1", expected_overlap=0.0)
    assert everything.link_bytes == int(HEADS * SCORED * BLOCK_BYTES * ABSENT)
    assert cost(decode, "prefetch_1", top_k=0, expected_overlap=0.0) == Cost(2.0, 0, 0)


def test_offload_of_a_decode_moves_one_block_in_so_many_steps(decode):
    assert cost(decode, "offload_blocks_0").link_bytes == HEADS * BLOCK_BYTES // 64


def test_copies_move_the_bytes_of_the_format(plan_of, decode):
    """For 64 tokens of 16 float32: 4096 codes of 8 or 4 bits, and a scale or two for each line."""
    prefill = plan_of("llama", "prefill", batch_size=3, **SETTINGS)
    for name, block in (("int8", 2048 + 80 * 4), ("int4", 1024 + 80 * 8)):
        new = cost(decode, "prefetch_1", kv_format=name).link_bytes
        assert new == int(HEADS * SCORED * block * 0.25 * ABSENT)
        assert cost(decode, "offload_blocks_0", kv_format=name).link_bytes == HEADS * block // 64
        stored = cost(prefill, "offload_blocks_0", kv_format=name).link_bytes
        assert stored == HEADS * (1024 // 64) * block
    read = [cost(decode, "sparse_attention_1", kv_format=f) for f in ("model", "int4")]
    assert read[0] == read[1]  # pages have the model's dtype


@pytest.mark.parametrize(("name", "block"), [("int8", 2048 + 80 * 4), ("int4", 1024 + 80 * 8)])
def test_attention_reads_the_bytes_of_small_pages(plan_of, name, block):
    """And of the tail, which is one of them; copies move what they move to other pages."""
    settings = {**SETTINGS, "kv_format": name}
    plans = {
        pages: plan_of("llama", "decode", batch_size=3, **settings, page_format=pages)
        for pages in ("model", "stored")
    }
    reads = {pages: cost(plan, "sparse_attention_1").hbm_bytes for pages, plan in plans.items()}
    selected = plans["model"].layout.num_selected
    saved = HEADS * selected * (BLOCK_BYTES - block)
    tail = 2 * HEADS * BLOCK_BYTES  # counted as two blocks of a pool
    assert reads["model"] - reads["stored"] == saved - tail
    for op in ("prefetch_1", "offload_blocks_0"):
        one, other = (cost(plan, op).link_bytes for plan in plans.values())
        assert one == other


def test_offload_of_a_prefill_moves_all_new_keys_and_values(plan_of):
    plan = plan_of("llama", "prefill", batch_size=3, **SETTINGS)
    # A prompt of unknown length counts as 1024 tokens.
    assert cost(plan, "offload_blocks_0").link_bytes == 2 * HEADS * 1024 * 16 * 4


@pytest.fixture
def sparse_prefill(plan_of):
    return plan_of("llama", "sparse_prefill", batch_size=3, **SETTINGS | {"max_tokens": 8192})


def test_what_a_prompt_reads_of_the_past_crosses_the_link_once(sparse_prefill):
    """The first token's blocks, and what each of 1024 replaces; or half of what the cache holds."""
    half = 8192 // 64 // 2
    expected = HEADS * half * BLOCK_BYTES
    assert cost(sparse_prefill, "stage_1") == Cost(2.0 + expected / 50.1e3, 0, expected)
    few = cost(sparse_prefill, "stage_1", top_k=1, sink_blocks=1, local_blocks=2)
    assert few.link_bytes == HEADS * half * BLOCK_BYTES
    none = cost(sparse_prefill, "stage_1", top_k=0, sink_blocks=1, local_blocks=2)
    assert none.link_bytes == HEADS * 4 * BLOCK_BYTES
    assert cost(sparse_prefill, "stage_1", offload="never").link_bytes == 0


BOTH = {"mode": "exact", "hint": ("next_query", "forecast")}


def copied(plan, **changes):
    """Return the bytes of each copy of layer 1, from CPU memory, by name."""
    ctx = context(plan, **changes)
    copies = find_ops(plan.graph_module.graph, "prefetch_blocks")
    mine = [n for n in copies if LAYER.of(n) == 1]
    return {n.name: node_cost(n, ctx).link_bytes for n in mine}


def test_what_a_hint_has_brought_is_not_fetched_again(plan_of, decode):
    exact = plan_of("llama", batch_size=3, **SETTINGS | {"mode": "exact"})
    new = cost(decode, "prefetch_1").link_bytes  # as many as in mode `query`
    found = copied(exact)
    assert found == {"hint_prefetch_1": new, "prefetch_1": int(new * 0.25)}
    # A hint that names all of them leaves nothing, and one that names none leaves all.
    assert copied(exact, expected_recall=1.0) == {"hint_prefetch_1": new, "prefetch_1": 0}
    assert copied(exact, expected_recall=0.0)["prefetch_1"] == new


def test_copies_of_perfect_hints_add_up_to_those_of_query(plan_of, decode):
    new = cost(decode, "prefetch_1").link_bytes
    both = plan_of("llama", batch_size=3, **SETTINGS | BOTH)
    found = copied(both, expected_recall=1.0)
    assert sum(found.values()) == new
    assert found == {"next_query_prefetch_1": new, "forecast_prefetch_1": 0, "prefetch_1": 0}


def test_hints_compose(plan_of, decode):
    """What the first brings the second does not; the repair is what both have missed."""
    new = cost(decode, "prefetch_1").link_bytes
    first, second = HINTS["next_query"].recall, HINTS["forecast"].recall
    both = plan_of("llama", batch_size=3, **SETTINGS | BOTH)
    expected = {
        "next_query_prefetch_1": new,
        "forecast_prefetch_1": new * (1 - first * second),
        "prefetch_1": new * (1 - first) * (1 - second),
    }
    assert copied(both) == pytest.approx(expected, abs=1)


def test_a_layer_without_a_guess_fetches_all_itself(plan_of, decode):
    plan = plan_of("llama", batch_size=3, **SETTINGS | {"mode": "exact", "hint": "next_query"})
    ctx = context(plan)
    copies = find_ops(plan.graph_module.graph, "prefetch_blocks")
    (first,) = (n for n in copies if LAYER.of(n) == 0)
    assert node_cost(first, ctx).link_bytes == cost(decode, "prefetch_0").link_bytes


def test_hint_of_the_step_before_brings_nothing(plan_of, decode):
    settings = SETTINGS | {"mode": "exact", "hint": "previous_step"}
    found = copied(plan_of("llama", batch_size=3, **settings))
    new = cost(decode, "prefetch_1").link_bytes
    assert found == {"hint_prefetch_1": 0, "prefetch_1": new}


def test_attention_in_parts_reads_each_block_once(plan_of):
    """Of 96 blocks 62 are scored, a quarter of these is new, and of those a hint misses a part.

    Attention goes by splits: one of s blocks waits if one of them is missing.
    """
    plan = plan_of("llama", batch_size=3, **SETTINGS | {"mode": "exact"})
    pool = HEADS * SELECTED * BLOCK_BYTES
    resident, missing = (
        next(n for n in plan.graph_module.graph.nodes if n.name == f"{name}_1")
        for name in ("attend_resident", "attend_missing")
    )
    splits = fake_value(argument(missing, "partial_lse")).shape[2]

    def pools(**changes):
        ctx = context(plan, **changes)
        none = context(plan, **changes | {"expected_overlap": 1.0})
        others = node_cost(resident, none).hbm_bytes - pool, node_cost(missing, none).hbm_bytes
        both = (node_cost(n, ctx).hbm_bytes for n in (resident, missing))
        return [found - other for found, other in zip(both, others, strict=True)]

    assert pools(expected_recall=1.0) == [pool, 0]
    late = 1 - (1 - 0.25 * 0.25 * ABSENT * SCORED / SELECTED) ** (SELECTED / splits)
    assert 0 < late < 1
    assert pools() == pytest.approx([pool * (1 - late), pool * late], abs=1)
    assert sum(pools(expected_recall=0.0)) == pytest.approx(pool, abs=1)


def test_a_prediction_misses_what_changes_and_the_current_block(decode):
    assert expected_misses(context(decode)) == 1 + SCORED * 0.25
    assert expected_misses(context(decode, expected_overlap=1.0)) == 1
