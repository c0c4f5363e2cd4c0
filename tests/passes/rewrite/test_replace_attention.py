"""ReplaceAttention: every site becomes select, plan and sparse attention over the paged cache."""

from __future__ import annotations

import pytest

from sparda_compile.graph.effects import argument, is_state, takes
from sparda_compile.graph.nodes import call_name, fake_value, find_ops, is_sparda, module_path
from sparda_compile.graph.site import sites_of
from sparda_compile.graph.tags import FACTS, LAYER, SITE
from sparda_compile.passes.base import Fact
from sparda_compile.passes.rewrite.replace_attention import ReplaceAttention
from sparda_compile.sizes import SAMPLES
from sparda_compile.state.layout import state_name

DECODE = [
    "score_blocks", "select_blocks", "plan_pages", "fetch_blocks", "append_kv", "update_summary",
    "sparse_attention", "store_blocks",
]  # fmt: skip
PREFILL = ["prefill_attention", "extend_kv", "update_summary", "store_blocks"]
SPARSE_PREFILL = [
    "update_summary", "select_tokens", "stage_blocks", "attend_tokens", "extend_kv", "store_blocks",
]  # fmt: skip

B = SAMPLES.batch


@pytest.fixture
def replaced(plan_of):
    """Return a function that gives the graph behind this pass, the counts and the plan."""

    def replace(model="llama", phase="decode", **settings):
        plan = plan_of(model, phase, **{"mode": "query"} | settings)
        record = next(s for s in plan.stages if s.name == ReplaceAttention.name)
        return record.graph_module, record.counts, plan

    return replace


def ops_of(gm, layer):
    nodes = [n for n in gm.graph.nodes if is_sparda(n)]
    return [call_name(n).removeprefix("sparda.") for n in nodes if LAYER.of(n) == layer]


def test_decode(replaced):
    gm, counts, _ = replaced()
    assert (counts["sparse"], counts["window"]) == (2, 0)
    assert ops_of(gm, 0) == ops_of(gm, 1) == DECODE
    assert ops_of(gm, -1) == ["advance_lengths"]


def test_prefill(replaced):
    gm, counts, _ = replaced(phase="prefill")
    assert (counts["sparse"], counts["window"]) == (2, 0)
    assert ops_of(gm, 0) == ops_of(gm, 1) == PREFILL
    assert ops_of(gm, -1) == ["number_tokens", "advance_lengths"]


def test_sparse_prefill(replaced):
    gm, counts, _ = replaced(phase="sparse_prefill")
    assert (counts["sparse"], counts["window"]) == (2, 0)
    assert ops_of(gm, 0) == ops_of(gm, 1) == SPARSE_PREFILL


@pytest.mark.parametrize("phase", ["prefill", "sparse_prefill"])
def test_tokens_are_numbered_once_before_all_layers(replaced, phase):
    gm, *_ = replaced(phase=phase)
    (numbered,) = find_ops(gm.graph, "number_tokens")
    assert next(n for n in gm.graph.nodes if n.op != "placeholder") is numbered
    taken = [argument(n, "tokens") for n in gm.graph.nodes if is_sparda(n) and takes(n, "tokens")]
    assert len(taken) == (4 if phase == "sparse_prefill" else 3) * 2  # so many ops of each layer
    for tokens in taken:
        assert [node.args for node in tokens] == [(numbered, i) for i in range(3)]
    for select in find_ops(gm.graph, "select_tokens"):
        assert argument(select, "positions").args == (numbered, 0)


@pytest.mark.parametrize("phase", ["prefill", "sparse_prefill", "decode"])
def test_what_was_there_is_gone(replaced, phase):
    gm, counts, plan = replaced(phase=phase)
    before = plan.stage("find_attention").graph
    gone = {"sparda.kv_update", "scaled_dot_product_attention"}
    assert gone <= {call_name(n) for n in before.nodes}
    assert not gone & {call_name(n) for n in gm.graph.nodes}
    # The causal mask and the repeats of keys and values go with them.
    assert counts["erased"] > 4
    assert dead(gm.graph) <= dead(before)


def dead(graph):
    """Names of the model's nodes whose result nobody takes."""
    own = (n for n in graph.nodes if n.op.startswith("call") and not LAYER.on(n))
    return {n.name for n in own if not n.users}


def test_layers_without_offload_copy_nothing(replaced):
    gm, _, plan = replaced(offload="never")
    assert not plan.layout.offload
    assert ops_of(gm, 0) == [op for op in DECODE if op not in ("fetch_blocks", "store_blocks")]
    assert not any("host" in n.name for n in gm.graph.nodes)


def test_a_format_that_rounds_stores_without_offload(replaced):
    """Then there is nothing to copy to, and the block is rounded in its page."""
    gm, _, _ = replaced(offload="never", kv_format="int8")
    assert ops_of(gm, 0) == [op for op in DECODE if op != "fetch_blocks"]
    assert [n.kwargs for n in find_ops(gm.graph, "store_blocks")] == [{"kv_format": "int8"}] * 2
    gm, _, _ = replaced(mode="dense", kv_format="int8")
    assert ops_of(gm, 0)[-2:] == ["sparse_attention", "store_blocks"]


STORED = {"kv_format": "int8", "page_format": "stored"}


def test_beside_pages_of_runs_new_tokens_go_to_the_tail(replaced):
    """What copies moves runs as they are; what attends and what stores is given the tail."""
    gm, _, _ = replaced(**STORED)
    assert ops_of(gm, 0) == list(DECODE)
    by_name = {node.name: node for node in gm.graph.nodes}
    tail = by_name["sparda_tail_0"]
    assert by_name["fetch_blocks_0"].kwargs == {}
    append = by_name["append_kv_0"]
    assert (append.args[4], append.kwargs) == (tail, {"is_tail": True})
    for op in ("sparse_attention_0", "store_blocks_0"):
        assert by_name[op].kwargs == {"kv_format": "int8", "tail": tail}
        assert by_name["sparda_pages_0"] in by_name[op].args


@pytest.mark.parametrize("phase", ["prefill", "sparse_prefill"])
def test_prompts_beside_pages_of_runs(replaced, phase):
    gm, _, _ = replaced(phase=phase, **STORED)
    by_name = {node.name: node for node in gm.graph.nodes}
    tail = by_name["sparda_tail_0"]
    reads = "prefill_attention_0" if phase == "prefill" else "stage_0"
    for op in (reads, "store_blocks_0"):
        assert by_name[op].kwargs == {"kv_format": "int8", "tail": tail}
    for op in ("extend_kv_0", *(["attend_tokens_0"] if phase == "sparse_prefill" else [])):
        assert tail in by_name[op].args
        assert by_name["sparda_pages_0"] not in by_name[op].args
        assert by_name[op].kwargs == {"is_tail": True}


def test_mode_dense_reads_every_block(replaced):
    gm, _, _ = replaced(mode="dense")
    assert ops_of(gm, 0) == ["all_blocks", "plan_pages", "append_kv", "sparse_attention"]


def test_both_summaries_of_mode_exact_are_kept(replaced):
    gm, _, _ = replaced(mode="exact", selector="quest", hint="forecast")
    kept = [argument(n, "summary") for n in find_ops(gm.graph, "update_summary")]
    assert kept == ["key_bounds", "pooled_keys"] * 2
    assert {argument(n, "selector") for n in find_ops(gm.graph, "score_blocks")} == {"quest"}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_window_layer_becomes_attention_over_a_ring(replaced, phase):
    gm, counts, _ = replaced("gemma3", phase)
    assert (counts["sparse"], counts["window"]) == (1, 1)
    assert ops_of(gm, 0) == ["window_attention"]
    assert ops_of(gm, 1) == (DECODE if phase == "decode" else PREFILL)
    (window,) = find_ops(gm.graph, "window_attention")
    assert {n.name for n in window.all_input_nodes if is_state(n)} - {"sparda_token_mask"} == {
        "sparda_lengths", "sparda_ring_k_0", "sparda_ring_v_0",
    }  # fmt: skip


def test_attention_takes_the_site_as_it_was_found(replaced):
    gm, _, plan = replaced()
    found = sites_of(plan.stage("find_attention").graph)
    for site, attention in zip(found, find_ops(gm.graph, "sparse_attention"), strict=True):
        assert argument(attention, "query").name == site.query.name
        assert argument(attention, "scale") == site.scale
        assert argument(attention, "softcap") == site.softcap
        assert SITE.of(attention).layer == site.layer
        append = find_ops(gm.graph, "append_kv")[site.layer]
        assert [n.name for n in append.args[:2]] == [site.k.name, site.v.name]


def test_selection_is_of_the_planned_size(replaced):
    gm, _, plan = replaced(top_k=3, local_blocks=2, sink_blocks=1)
    for ids in find_ops(gm.graph, "select_blocks"):
        assert tuple(fake_value(ids).shape) == (B, 2, plan.layout.num_selected) == (B, 2, 7)
    (plan_pages, _) = find_ops(gm.graph, "plan_pages")
    assert [u.args[1] for u in plan_pages.users] == [0, 1, 2, 3, 4]
    assert [tuple(fake_value(u).shape) for u in plan_pages.users] == [(B, 2, 7)] * 4 + [(B, 2)]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_state_comes_as_inputs_of_the_layouts_shapes(replaced, phase):
    gm, _, plan = replaced(phase=phase)
    specs = plan.layout.traced().all_tensors()
    inputs = {n.name: fake_value(n) for n in gm.graph.nodes if is_state(n)}
    mask = inputs.pop("sparda_token_mask", None)
    by_name = {n.name: fake_value(n) for n in gm.graph.nodes if n.op == "placeholder"}
    known = [by_name.get(name) for name in ("sparda_num_past", "sparda_may_hide")]
    assert (mask is not None) == (phase == "prefill")
    assert known == ([0, True] if phase == "prefill" else [None, None])
    assert state_name("pages", 1) in inputs
    for name, value in inputs.items():
        assert tuple(value.shape) == specs[name].shape, name
        assert value.dtype == specs[name].dtype, name
    # Inputs stay in front of everything else.
    ops = [n.op for n in gm.graph.nodes]
    assert "placeholder" not in ops[ops.index("call_function") :]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_new_nodes_have_metadata(replaced, phase):
    gm, _, plan = replaced(phase=phase)
    for node in gm.graph.nodes:
        if is_sparda(node) and LAYER.of(node) >= 0:
            layer = LAYER.of(node)
            assert module_path(node) == f"model.layers.{layer}.self_attn", node.name
            assert "stack_trace" in node.meta
            assert "val" in node.meta
    assert Fact.ATTENTION_REPLACED in FACTS.of(plan.graph_module)


def test_end_of_the_step_counts_real_tokens_only(replaced):
    (end,) = find_ops(replaced(phase="prefill")[0].graph, "advance_lengths")
    assert end.args[0].name == "sparda_token_mask"
    (end,) = find_ops(replaced()[0].graph, "advance_lengths")
    assert end.args[0] is None
