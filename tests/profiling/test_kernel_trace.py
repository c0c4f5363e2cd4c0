"""From a profiler's trace to the nodes of a plan."""

from __future__ import annotations

import collections
import functools
import random
import re
from pathlib import Path

import pytest

from sparda_compile.bench.trace import following
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.isa.streams import COMPUTE, COPY, SELECT
from sparda_compile.module.captures_of import captures_of
from sparda_compile.profiling.kernel_trace import (
    Kernel,
    PlannedNode,
    assign_kernels,
    own_kernels,
    planned_nodes,
    read_kernels,
    split_replays,
)
from sparda_compile.program.plan import make_plan
from sparda_compile.testing import tiny_llama

GPU = Path(__file__).resolve().parents[2] / "sparda_compile" / "kernels" / "gpu"
# Of a prompt alone, which nothing profiles by node.
OTHER_KERNELS = {
    "_copy_runs", "_number_tokens", "_keep_blocks", "_extend_kv", "_extend_tail",
    "_extend_pooled_keys",
    "_extend_key_bounds", "_store_prefix", "_store_prefix_packed",
    "_token_sums", "_token_blocks", "_pick_tokens", "_pick_past", "_pick_near",
    "_unpack_keys", "_token_masses", "_mass_scores", "_candidate_masses", "_pick_candidates",
    "_mark_blocks", "_place_blocks", "_copy_pages", "_gather_listed",
    "_gather_listed_packed",
    "_pack_blocks", "_tile_unions",
    "_attend_tokens", "_list_entries", "_attend_tile", "_rate_candidates", "_judge_rows",
    "_extend_low_bit_keys",
}  # fmt: skip
# Two layers of mode exact: name, stream, kernels. Two streams select.
EXACT = """
hint_score_1     2 _score_forecast
hint_select_1    2 _select_pages
hint_fetch_1     1 _gather
score_0          0 _infllm2_logits _infllm2_blocks
select_0         0 _select_pages
plan_0           0 _select_pages
append_0         0 _append_kv
attend_0         0 _partials
fetch_0          1 _gather
hint_score_2     2 _score_forecast
hint_select_2    2 _select_pages
hint_fetch_2     1 _gather
score_1          0 _infllm2_logits _infllm2_blocks
select_1         0 _select_pages
plan_1           0 _select_pages
append_1         0 _append_kv
attend_1         0 _partials
"""


def parse(text, behind=None):
    """Return the nodes; the layer is the number that a name ends in.

    `behind` tells what each depends on; left out, that is the one before it on its stream.
    """
    nodes, last = [], {}
    for line in text.strip().split("\n"):
        name, stream, *kernels = line.split()
        before = frozenset(last.get(stream, ())) if behind is None else behind.get(name, ())
        layer = int(name[-1]) if name[-1].isdigit() else 0
        op = f"sparda.{name}"
        nodes.append(
            PlannedNode(
                name, op, layer, int(stream), tuple(kernels), behind=frozenset(before)
            )
        )  # fmt: skip
        last[stream] = (name,)
    return nodes


@functools.cache
def plan(trace_steps=0, top_k=4, **settings):
    captures = captures_of(shared_model())
    sizes = {"block_size": 16, "top_k": top_k, "local_blocks": 2, "machine": "h200"}
    return make_plan(
        captures, "decode", following(SpardaConfig(**sizes, **settings), trace_steps),
        batch_size=1, max_tokens=2048,
    )  # fmt: skip


@functools.cache
def shared_model():
    return tiny_llama()


def kernels_by_op(trace_steps=0, batch_size=1, **settings):
    found = collections.defaultdict(set)
    for node in planned_nodes(plan(trace_steps, **settings).graph_module.graph, batch_size):
        found[node.op.removeprefix("sparda.")].add(node.kernels)
    return found


def test_every_kernel_that_is_launched_has_a_node():
    launched = {
        name
        for path in GPU.glob("*.py")
        for name in re.findall(r"\blaunch\((_\w+),", path.read_text(encoding="utf-8"))
    }
    assert launched - OTHER_KERNELS == own_kernels()


def test_nodes_of_a_forecast_plan():
    found = kernels_by_op(4, mode="forecast", offload="always")
    assert found["score_blocks"] == {("_score_forecast", "_raise_scores")}
    assert found["select_pages"] == {("_select_pages",)}
    assert found["prefetch_blocks"] == {("_gather",)}
    assert found["offload_blocks"] == {("_store_tail",)}
    assert found["append_kv"] == {("_append_kv",)}
    assert found["update_summary"] == {("_append_pooled_keys",)}
    assert found["sparse_attention"] == {("_partials",)}  # of 64 tokens, one split
    for op in ("fork_stream", "wait_blocks", "advance_lengths"):
        assert found[op] == {()}


def test_what_is_attended_to_in_splits_is_merged():
    found = kernels_by_op(top_k=32, mode="query", offload="always")
    assert found["sparse_attention"] == {("_partials", "_merge")}
    # So many sequences feed the GPU by themselves.
    found = kernels_by_op(batch_size=4096, top_k=32, mode="query", offload="always")
    assert found["sparse_attention"] == {("_partials",)}


def test_nodes_of_an_exact_plan():
    settings = {"mode": "exact", "hint": "forecast", "offload": "always"}
    found = kernels_by_op(**settings, attend_before_repair="always")
    assert found["score_blocks"] == {("_score_forecast",), ("_infllm2_logits", "_infllm2_blocks")}
    assert found["select_blocks"] == found["plan_pages"] == {("_select_pages",)}
    assert found["attend_resident"] == {("_partials",)}
    assert found["attend_missing"] == {("_partials", "_merge")}


def test_nodes_without_offload_copy_nothing():
    found = kernels_by_op(mode="query", selector="quest", offload="never")
    assert found["score_blocks"] == {("_score_quest",)}
    assert found["update_summary"] == {("_append_key_bounds",)}
    names = {name for kernels in found.values() for each in kernels for name in each}
    assert not names & {"_gather", "_store_tail"}


def test_events_link_a_wait_to_its_copy():
    nodes = planned_nodes(plan(4, mode="forecast", offload="always").graph_module.graph, 1)
    started = {n.event for n in nodes if n.op.endswith(("prefetch_blocks", "offload_blocks"))}
    waited = {n.event for n in nodes if n.op == "sparda.wait_blocks"}
    assert started == waited
    assert -1 not in waited
    assert {n.event for n in nodes if n.op == "sparda.append_kv"} == {-1}


def test_reading_keeps_device_work_by_start_time():
    def event(name, ts, cat="kernel", ph="X"):
        return {"ph": ph, "cat": cat, "name": name, "ts": ts, "dur": 2.5, "args": {}}

    events = [
        event("late", 9.0), event("copy", 4.0, "gpu_memcpy"), event("launch", 1.0, "cuda_runtime"),
        event("flow", 2.0, "ac2g", "s"), {"ph": "M", "name": "thread_name"},
        {**event("first", "3.5"), "args": {"correlation": 7}},
    ]  # fmt: skip
    assert read_kernels(events) == [
        Kernel("first", 3.5, 6.0, 7), Kernel("copy", 4.0, 6.5, -1), Kernel("late", 9.0, 11.5, -1),
    ]  # fmt: skip


def test_replays_are_told_apart_by_their_launch(decode_trace):
    kernels = read_kernels(decode_trace.events)
    first, second = split_replays(kernels)
    assert {kernel.launch for kernel in first}.isdisjoint(kernel.launch for kernel in second)
    alone = len(kernels) - len(first) - len(second)
    assert alone == sum(kernel.name.startswith("Memcpy DtoD") for kernel in kernels) > 0
    assert split_replays([Kernel("a", 0.0, 1.0, -1), Kernel("b", 1.0, 2.0, -1)]) == []


def test_kernels_of_a_real_replay(decode_trace):
    for replay in split_replays(read_kernels(decode_trace.events)):
        found = assign_kernels(replay, decode_trace.nodes)
        expected = {n.node: n.kernels for n in decode_trace.nodes if n.kernels}
        assert {node: tuple(k.name for k in mine) for node, mine in found.items()} == expected
        # Here every name is on one stream, so its k-th kernel is that of the k-th node.
        for name in own_kernels():
            in_order = [k for n in decode_trace.nodes for k in found.get(n.node, ())]
            assert [k for k in in_order if k.name == name] == [k for k in replay if k.name == name]


def run(nodes, seed):
    """Return the kernels of a step on its streams at random speeds, and whose they are."""
    speed = random.Random(seed)
    clock, work = [0.0, 0.0, 0.0], []
    for node in nodes:
        if node.stream == COPY:
            clock[COPY] = max(clock)  # behind all compute and selection issued so far
        elif node.stream == SELECT:
            clock[SELECT] = max(clock[SELECT], clock[COMPUTE])
        elif node.node.startswith("append"):
            clock[COMPUTE] = max(clock)  # a wait
        for name in node.kernels:
            start = clock[node.stream] + 0.5
            clock[node.stream] = start + speed.uniform(1.0, 30.0)
            work.append((Kernel(name, start, clock[node.stream], 1), node.node))
        if node.stream == COMPUTE:
            start = clock[COMPUTE] + 0.5
            clock[COMPUTE] = start + speed.uniform(1.0, 60.0)
            work.append((Kernel("gemm", start, clock[COMPUTE], 1), None))
    return sorted(work, key=lambda each: each[0].start_us)


@pytest.mark.parametrize("seed", range(40))
def test_a_name_on_both_streams_is_told_apart(seed):
    nodes = parse(EXACT)
    work = run(nodes, seed)
    found = assign_kernels([kernel for kernel, _ in work], nodes)
    expected = collections.defaultdict(list)
    for kernel, node in work:
        if node:
            expected[node].append(kernel)
    assert found == expected


def test_copy_stream_starts_behind_the_compute_before_it():
    nodes = parse("plan 0 _select_pages\nhint 1 _select_pages")
    first, second = Kernel("_select_pages", 0.0, 5.0, 1), Kernel("_select_pages", 6.0, 9.0, 1)
    assert assign_kernels([first, second], nodes) == {"plan": [first], "hint": [second]}
    assert assign_kernels([first, second], nodes[::-1]) == {"hint": [first], "plan": [second]}


def test_copy_stays_behind_compute_where_clocks_are_not_exact():
    nodes = parse("plan 0 _select_pages\nhint 1 _select_pages")
    first, second = Kernel("_select_pages", 1.0, 5.0, 1), Kernel("_select_pages", 6.0, 9.0, 1)
    step = [Kernel("gemm", 0.0, 1.2, 1), first, second]
    assert assign_kernels(step, nodes) == {"plan": [first], "hint": [second]}


def test_stream_that_is_busy_is_not_taken():
    nodes = parse("fetch 1 _gather\nhint 1 _select_pages\nplan 0 _select_pages")
    gather = Kernel("_gather", 1.0, 20.0, 1)
    first, second = Kernel("_select_pages", 3.0, 6.0, 1), Kernel("_select_pages", 21.0, 25.0, 1)
    found = assign_kernels([gather, first, second], nodes)
    assert found == {"fetch": [gather], "plan": [first], "hint": [second]}


def test_wrong_number_of_kernels_is_refused(decode_trace):
    replay, _ = split_replays(read_kernels(decode_trace.events))
    lost = next(i for i, kernel in enumerate(replay) if kernel.name == "_gather")
    with pytest.raises(UnsupportedInputError, match="3 of _gather, not 4"):
        assign_kernels(replay[:lost] + replay[lost + 1 :], decode_trace.nodes)


MOVED = """
append_1 0 _append_kv
update_1 0 _append_pooled_keys
append_2 0 _append_kv
fetch_2  1 _gather
store_1  1 _store_tail
"""


@pytest.mark.parametrize("order", ["update_1 append_1 append_2", "append_1 append_2 update_1"])
@pytest.mark.parametrize("copies", ["fetch_2 store_1", "store_1 fetch_2"])
def test_ops_that_do_not_depend_on_each_other_may_have_changed_places(order, copies):
    nodes = parse(MOVED, {"append_2": ["append_1"], "store_1": ["append_1"]})
    kernel_of = {node.node: node.kernels[0] for node in nodes}
    ran = [*order.split(), *copies.split()]
    kernels = [Kernel(kernel_of[node], float(i), i + 0.5, 1) for i, node in enumerate(ran)]
    found = assign_kernels(kernels, nodes)
    assert {node: mine[0].start_us for node, mine in found.items()} == {
        node: float(i) for i, node in enumerate(ran)
    }


def test_op_that_runs_before_what_it_depends_on_is_refused():
    nodes = parse(MOVED, {"append_2": ["append_1"], "store_1": ["append_1"]})
    names = ("_store_tail", "_append_kv", "_append_kv", "_append_pooled_keys", "_gather")
    kernels = [Kernel(name, float(i), i + 0.5, 1) for i, name in enumerate(names)]
    with pytest.raises(UnsupportedInputError, match=r"next are _append_kv, .*_pooled_keys, _gath"):
        assign_kernels(kernels, nodes)


def test_nodes_know_what_they_depend_on():
    nodes = planned_nodes(plan(4, mode="forecast", offload="always").graph_module.graph, 1)
    by_op = {(n.op.removeprefix("sparda."), n.layer): n for n in nodes}

    def is_behind(later, earlier):
        """Whether there is a way of dependences from one to the other."""
        seen, stack = set(), [by_op[later].node]
        names = {n.node: n for n in nodes}
        while stack:
            for each in names[stack.pop()].behind - seen:
                seen.add(each)
                stack.append(each)
        return by_op[earlier].node in seen

    assert is_behind(("sparse_attention", 1), ("prefetch_blocks", 1))  # through a wait
    assert is_behind(("prefetch_blocks", 1), ("select_pages", 1))
    assert is_behind(("offload_blocks", 1), ("append_kv", 1))
    assert not is_behind(("offload_blocks", 0), ("prefetch_blocks", 1))
    assert not is_behind(("prefetch_blocks", 1), ("offload_blocks", 0))
    assert not is_behind(("update_summary", 1), ("append_kv", 1))


def test_wrong_order_of_kernels_is_refused():
    nodes = parse("append 0 _append_kv\nattend 0 _partials _merge")
    names = ("_append_kv", "_merge", "_partials")
    kernels = [Kernel(name, float(i), i + 0.5, 1) for i, name in enumerate(names)]
    with pytest.raises(UnsupportedInputError, match=r"kernel 2 .*, _merge, .* next are _partials"):
        assign_kernels(kernels, nodes)
