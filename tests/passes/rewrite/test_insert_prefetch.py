"""InsertPrefetch: every copy in line becomes a fork, a start and a wait."""

from __future__ import annotations

import pytest

from sparda_compile.graph.effects import accesses, argument, is_state, stream_of
from sparda_compile.graph.nodes import call_name, fake_value, find_ops, program_order
from sparda_compile.graph.tags import HINT, LAYER, SITE
from sparda_compile.graph.text import graph_text
from sparda_compile.isa.streams import ATTEND, COMPUTE, COPY, REPAIR


@pytest.fixture
def inserted(plan_of):
    """Return a function that gives the graph behind this pass and its counts."""

    def insert(model="llama", phase="decode", **settings):
        plan = plan_of(model, phase, **settings)
        record = next(s for s in plan.stages if s.name == "insert_prefetch")
        return record.graph_module.graph, record.counts

    return insert


# What choosing and fetching a layer's blocks uses.
USED = {"block_table", "page_block", "page_stamp", "counters", "pages", "pooled_k", "recent_k"}
COUNTS = {
    "forecast": ({"mode": "forecast"}, (0, 2, 0, 2, 0, 0, 4)),
    "query": ({"mode": "query"}, (0, 0, 0, 2, 0, 0, 2)),
    "exact": ({"mode": "exact"}, (2, 2, 0, 2, 0, 2, 6)),
    "exact by the layer before": (
        {"mode": "exact", "hint": "previous_layer"},
        (1, 2, 0, 2, 0, 0, 5),
    ),
    "exact by two hints": ({"mode": "exact", "hint": ("ema", "forecast")}, (4, 2, 0, 2, 2, 2, 10)),
    "prefill": ({"phase": "prefill"}, (0, 0, 0, 2, 0, 0, 2)),
    "window": ({"model": "gemma3"}, (0, 1, 0, 1, 0, 0, 2)),
    "sparse prefill": ({"phase": "sparse_prefill"}, (0, 0, 2, 2, 0, 0, 4)),
    "sparse prefill by query": (
        {"phase": "sparse_prefill", "mode": "query"},
        (0, 0, 0, 2, 0, 0, 2),
    ),
    "windows and a sparse prefill": (
        {"model": "gemma3", "phase": "sparse_prefill"},
        (0, 0, 1, 1, 0, 0, 2),
    ),
}


@pytest.mark.parametrize("case", COUNTS)
def test_counts(inserted, case):
    settings, expected = COUNTS[case]
    _, counts = inserted(**settings)
    names = ("hint_prefetches", "prefetches", "staged", "offloads", "for_later", "pieces", "waits")
    assert counts == dict(zip(names, expected, strict=True))


@pytest.mark.parametrize("case", COUNTS)
def test_every_copy_has_its_fork_its_event_and_its_wait(inserted, case):
    graph, _ = inserted(**COUNTS[case][0])
    order = program_order(graph)
    starts = find_ops(graph, "prefetch_blocks", "offload_blocks", "record_event")
    waits = {argument(w, "event"): w for w in find_ops(graph, "wait_blocks")}
    events = [argument(n, "event") for n in (*starts, *find_ops(graph, "fork_stream"))]
    assert len(set(events)) == len(events) == 2 * len(starts)
    for start in starts:
        copy = start if call_name(start) != "sparda.record_event" else marked(start)
        fork, wait = argument(copy, "after"), waits[argument(start, "event")]
        assert call_name(fork) == "sparda.fork_stream"
        assert list(fork.users) == [copy]
        assert argument(wait, "ticket") is start
        assert order[fork] < order[copy] <= order[start] < order[wait]
        assert stream_of(copy) == stream_of(start) == stream_that_fits(copy)
        layers = {LAYER.of(n) for n in (fork, copy, start, wait)}
        assert len(layers) == 1
        # So the fork depends on all that the copy must follow.
        taken = {n for n in copy.all_input_nodes if n is not fork and not is_number(n)}
        assert taken <= set(fork.all_input_nodes)


def marked(mark):
    """Return the op whose end a mark is: that makes what it takes, or updates that state."""
    made = mark.args[0][0]
    return made.args[0] if made.args else mark.prev


def stream_that_fits(work):
    if call_name(work) == "sparda.update_prediction":
        return ATTEND
    return REPAIR if is_repair(work) else COPY


def is_repair(copy):
    """Whether a copy brings what a guess has missed: then no other layer's blocks are before it."""
    is_exact = any(find_ops(copy.graph, "attend_missing"))
    return is_exact and call_name(copy) == "sparda.prefetch_blocks" and not HINT.on(copy)


@pytest.mark.parametrize("before_repair", ["always", "auto"])
@pytest.mark.parametrize("hint", ["ema", "mixture", ("ema", "previous_step")])
def test_what_only_later_steps_use_runs_beside_the_model(inserted, hint, before_repair):
    """Behind the layer's attention to what is there; nothing of this step waits for it."""
    settings = {"hint": hint, "attend_before_repair": before_repair, "machine": "h200"}
    graph, counts = inserted(mode="exact", **settings)
    order = program_order(graph)
    updates = find_ops(graph, "update_prediction")
    later = [*updates, *find_ops(graph, "learn_mixture")]
    assert counts["for_later"] == len(later) == 2  # of a mixture both are the second layer's
    for update in updates:
        mine = sorted((n for n in later if LAYER.of(n) == LAYER.of(update)), key=order.get)
        fork, mark = mine[0].prev, update.next
        (wait,) = mark.users
        assert [argument(n, "after") for n in mine] == [fork, *[None] * (len(mine) - 1)]
        assert list(fork.users) == [mine[0]]
        assert {stream_of(n) for n in (*mine, mark)} == {ATTEND}
        assert argument(update, "scores") in argument(fork, "inputs")
        # The scores live until the wait, and the state is free behind it.
        assert argument(update, "scores") in argument(wait, "keepalive")
        changed = {a.state for n in mine for a in accesses(n) if a.is_write}
        assert {a.state for a in accesses(wait)} == changed
        behind = [call_name(n) for n in graph.nodes if order[n] > order[wait]]
        assert set(behind) <= {"sparda.wait_blocks", "sparda.advance_lengths", "output"}
        attend = "attend_resident" if before_repair == "always" else "sparse_attention"
        attention = next(n for n in find_ops(graph, attend) if LAYER.of(n) == LAYER.of(update))
        assert order[attention] < order[fork]
    for other in find_ops(graph, "remember_ids"):
        assert stream_of(other) == COMPUTE


def test_an_update_stays_in_line_where_nothing_is_copied(plan_of):
    plan = plan_of("llama", "decode", mode="exact", hint="ema", offload="never")
    graph = plan.graph_module.graph
    assert {stream_of(n) for n in find_ops(graph, "update_prediction")} == {COMPUTE}
    assert not find_ops(graph, "record_event")


def is_number(node):
    return isinstance(fake_value(node), int)


def test_a_prompt_picks_from_the_past_and_fetches_it_before_its_new_keys(inserted):
    graph, _ = inserted(phase="sparse_prefill", mode="forecast")
    order = program_order(graph)
    for layer, stage in enumerate(find_ops(graph, "stage_blocks")):
        (past, picked, update, attention) = (
            find_ops(graph, name)[layer]
            for name in ("select_past", "select_tokens", "update_summary", "attend_tokens")
        )
        near_ids = argument(stage, "block_ids")
        assert near_ids.args == (past, 0)
        assert argument(picked, "near_ids") is near_ids
        assert argument(picked, "near_scores").args == (past, 1)
        for name in ("query", "summary", "lengths", "selector", "num_selected", "local_blocks"):
            assert argument(past, name) == argument(picked, name)
        assert argument(attention, "block_ids") is picked
        assert argument(attention, "staging").args == (stage, 0)
        assert argument(attention, "slots").args == (stage, 1)
        (mark,) = (u for u in argument(attention, "slots").users if u is not attention)
        (wait,) = mark.users
        places = [order[n] for n in (past, stage, mark, wait, update, picked, attention)]
        assert places == sorted(places)
        names = ("pages", "block_table", "pooled_k", "recent_k")
        assert {a.state for a in accesses(wait)} == {f"sparda_{name}_{layer}" for name in names}


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "query"},
        {"mode": "exact"},
        {"mode": "forecast", "offload": "never"},
        # A window of the past that new keys complete would change a block that is not kept.
        {"mode": "forecast", "local_blocks": 0},
        {"mode": "forecast", "block_size": 16, "pool_size": 64, "local_blocks": 2},
    ],
)
def test_a_prompt_fetches_in_line_what_it_cannot_know_before(inserted, settings):
    graph, counts = inserted(phase="sparse_prefill", **settings)
    assert counts.get("staged", 0) == 0
    assert not find_ops(graph, "select_past", "record_event")
    stages = find_ops(graph, "stage_blocks")
    assert [stream_of(stage) for stage in stages] == [COMPUTE, COMPUTE]
    picked = find_ops(graph, "select_tokens")
    assert [argument(stage, "block_ids") for stage in stages] == picked


def test_nothing_stays_in_line_but_the_fetches_of_mode_query(inserted):
    assert not find_ops(inserted(mode="forecast")[0], "fetch_blocks", "store_blocks")
    assert not find_ops(inserted(mode="exact")[0], "fetch_blocks", "store_blocks")
    graph, _ = inserted(mode="query")
    assert len(find_ops(graph, "fetch_blocks")) == 2
    assert not find_ops(graph, "store_blocks")


def test_wait_of_a_prefetch_stands_before_everything_that_uses_the_pages(inserted):
    graph, _ = inserted(mode="forecast")
    order = program_order(graph)
    for layer, prefetch in enumerate(find_ops(graph, "prefetch_blocks")):
        (wait,) = prefetch.users
        users = find_ops(graph, "append_kv", "sparse_attention", "offload_blocks")
        mine = [n for n in users if LAYER.of(n) == layer]
        assert order[wait] < min(order[n] for n in mine)
        written = {a.state for a in accesses(wait) if a.is_write}
        assert written == {f"sparda_{name}_{layer}" for name in USED}


def test_wait_of_an_offload_stands_at_the_end(inserted):
    graph, _ = inserted(mode="forecast")
    (end,) = find_ops(graph, "advance_lengths")
    for offload in find_ops(graph, "offload_blocks"):
        (wait,) = offload.users
        layer = LAYER.of(wait)
        assert [a.state for a in accesses(wait)] == [f"sparda_host_{layer}"]
        between = []
        node = wait.next
        while node is not end:
            between.append(call_name(node))
            node = node.next
        assert set(between) <= {"sparda.wait_blocks"}


def test_wait_of_an_offload_takes_pages_that_are_rounded(inserted):
    graph, _ = inserted(mode="forecast", kv_format="int8")
    for copy in find_ops(graph, "offload_blocks", "prefetch_blocks"):
        assert copy.kwargs["kv_format"] == "int8"
    for layer, offload in enumerate(find_ops(graph, "offload_blocks")):
        (wait,) = offload.users
        states = [a.state for a in accesses(wait)]
        assert states == [f"sparda_pages_{layer}", f"sparda_host_{layer}"]


def test_waits_take_the_tail_beside_pages_of_runs(inserted):
    """That of an offload, which packs it, and that of a plan on the select stream."""
    settings = {"kv_format": "int8", "page_format": "stored"}
    graph, _ = inserted(mode="forecast", **settings)
    for layer, offload in enumerate(find_ops(graph, "offload_blocks")):
        tail = next(n for n in graph.nodes if n.name == f"sparda_tail_{layer}")
        assert offload.kwargs == {"kv_format": "int8", "tail": tail}
        (wait,) = offload.users
        states = [a.state for a in accesses(wait)]
        assert states == [f"sparda_{name}_{layer}" for name in ("pages", "tail", "host")]
    for layer, copy in enumerate(find_ops(graph, "prefetch_blocks")):
        assert "kv_format" not in copy.kwargs
        waits = [user for user in copy.users if call_name(user) == "sparda.wait_blocks"]
        assert f"sparda_tail_{layer}" in {a.state for wait in waits for a in accesses(wait)}
    graph, _ = inserted(mode="exact", hint="forecast", attend_before_repair="always", **settings)
    for op in find_ops(graph, "attend_resident", "attend_missing"):
        assert op.kwargs["kv_format"] == "int8"


def test_exact_splits_attention_around_the_repair(inserted):
    graph, _ = inserted(mode="exact", hint="forecast")
    order = program_order(graph)
    assert not find_ops(graph, "sparse_attention")
    for layer in (0, 1):
        mine = [n for n in graph.nodes if LAYER.get(n) == layer]
        ops = [call_name(n).removeprefix("sparda.") for n in mine]
        repair = next(n for n in mine if n.name == f"prefetch_{layer}")
        resident, missing = (find_ops(graph, f"attend_{w}")[layer] for w in ("resident", "missing"))
        (wait,) = repair.users
        assert order[repair] < order[resident] < order[wait] < order[missing]
        assert ops.index("append_kv") < ops.index("attend_resident")
        assert argument(missing, "partial_out").args == (resident, 0)
        assert argument(missing, "partial_lse").args == (resident, 1)
        assert SITE.of(missing).layer == layer
        for name in ("query", "page_ids", "block_ids", "is_miss", "scale", "softcap"):
            assert argument(missing, name) == argument(resident, name)


def test_hint_is_fetched_before_the_layers_own_plan(inserted):
    graph, _ = inserted(mode="exact", hint="forecast")
    order = program_order(graph)
    for layer in (0, 1):
        by_name = {n.name: n for n in graph.nodes}
        guess, plan = by_name[f"hint_plan_{layer}"], by_name[f"plan_{layer}"]
        assert argument(guess, "is_hint") is True
        assert argument(plan, "is_hint") is False
        assert argument(guess, "block_ids").name == f"hint_block_ids_{layer}"
        prefetch = by_name[f"hint_prefetch_{layer}"]
        (wait,) = prefetch.users
        assert order[guess] < order[prefetch] < order[wait] < order[plan]
        written = {a.state for a in accesses(wait)}
        assert written == {f"sparda_{name}_{layer}" for name in USED}


def test_nothing_to_do_without_offload(plan_of):
    plan = plan_of("llama", mode="query", offload="never")
    before, after = (plan.stage(name) for name in ("insert_forecast", "insert_prefetch"))
    assert graph_text(before.graph) == graph_text(after.graph)
    record = next(s for s in plan.stages if s.name == "insert_prefetch")
    assert set(record.counts.values()) == {0}


def test_everything_else_is_as_it_was(plan_of):
    plan = plan_of("llama", mode="forecast")
    before, after = (plan.stage(name).graph for name in ("insert_forecast", "insert_prefetch"))
    copies = {"fetch_blocks", "store_blocks", "prefetch_blocks", "offload_blocks", "fork_stream",
              "wait_blocks"}  # fmt: skip

    def others(graph):
        mine = {f"sparda.{name}" for name in copies}
        return [(n.name, str(n.args)) for n in graph.nodes if call_name(n) not in mine]

    assert others(before) == others(after)


def test_prefill_offloads_the_new_keys_and_values(inserted):
    graph, _ = inserted(phase="prefill", mode="query")
    for offload in find_ops(graph, "offload_blocks"):
        new = argument(offload, "new_kv")
        assert len(new) == 2
        (wait,) = offload.users
        # The last copy is the last that reads the numbers of the tokens.
        is_last = wait is find_ops(graph, "wait_blocks")[-1]
        kept = {*new, *(argument(offload, "tokens") if is_last else ())}
        assert set(argument(wait, "keepalive")) == kept
        assert any(is_state(n) for n in argument(offload, "after").all_input_nodes)


class TestTwoHints:
    @pytest.fixture
    def graph(self, inserted):
        return inserted(mode="exact", hint=("ema", "forecast"), page_ratio=1.0)[0]

    def test_each_plans_and_fetches_before_the_layer_does(self, graph):
        order = [node.name for node in graph.nodes]
        for layer in range(2):
            names = [
                *(f"ema_{what}_{layer}" for what in ("plan", "fork", "prefetch")),
                *(f"forecast_{what}_{layer}" for what in ("plan", "fork", "prefetch")),
                f"plan_{layer}",
            ]
            places = [order.index(name) for name in names]
            assert places == sorted(places)

    def test_the_last_copy_is_awaited_first(self, graph):
        for layer in range(2):
            waits = [n for n in find_ops(graph, "wait_blocks") if LAYER.of(n) == layer]
            tickets = [argument(wait, "ticket").name for wait in waits]
            assert tickets[:2] == [f"forecast_prefetch_{layer}", f"ema_prefetch_{layer}"]

    def test_what_belongs_to_a_hint_says_so(self, graph):
        for hint in ("ema", "forecast"):
            plan = next(n for n in graph.nodes if n.name == f"{hint}_plan_1")
            prefetch = next(n for n in graph.nodes if n.name == f"{hint}_prefetch_1")
            for node in (plan, *plan.users, prefetch, *prefetch.users):
                assert HINT.of(node) == hint
        assert not HINT.on(next(n for n in graph.nodes if n.name == "plan_1"))


def test_what_only_later_steps_use_runs_beside_the_repair(inserted):
    for hint, op in (("ema", "update_prediction"), ("previous_step", "remember_ids")):
        graph, _ = inserted(mode="exact", hint=hint)
        order = program_order(graph)
        for node in find_ops(graph, op):
            layer = LAYER.of(node)
            missing = next(n for n in find_ops(graph, "attend_missing") if LAYER.of(n) == layer)
            resident = next(n for n in find_ops(graph, "attend_resident") if LAYER.of(n) == layer)
            assert order[resident] < order[node] < order[missing]
