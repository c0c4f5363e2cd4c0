"""FuseSelection: which selections meet their plan in one op, and what their users see."""

from __future__ import annotations

import pytest

from sparda_compile.errors import PassError
from sparda_compile.graph.effects import argument, set_argument
from sparda_compile.graph.nodes import call_name, fake_value, find_ops, program_order, snapshot
from sparda_compile.graph.tags import FACTS, HINTS, LAYER
from sparda_compile.graph.text import graph_text
from sparda_compile.passes.base import Fact, PassContext
from sparda_compile.passes.machine import MACHINES
from sparda_compile.passes.manager import run_passes
from sparda_compile.passes.rewrite.fuse_selection import FuseSelection

CASES = {
    "forecast": ({"mode": "forecast"}, (2, 0)),
    "query": ({"mode": "query"}, (2, 0)),
    # A wait is anchored to the layer's own ids: only the hints are left.
    "exact": ({"mode": "exact"}, (2, 2)),
    "exact by recalled ids": ({"mode": "exact", "hint": "previous_step"}, (0, 4)),
    "exact by the layer before": ({"mode": "exact", "hint": "previous_layer"}, (0, 3)),
    # The first layer has no hint, so no wait.
    "exact by the next query": ({"mode": "exact", "hint": "next_query"}, (2, 1)),
    "exact in line": (
        {"mode": "exact", "disable_passes": ("insert_prefetch", "schedule_transfers")},
        (2, 0),
    ),
    "dense": ({"mode": "dense"}, (0, 2)),
    "prefill": ({"phase": "prefill"}, (0, 0)),
    "window": ({"model": "gemma3"}, (1, 0)),
}


@pytest.fixture
def stages(plan_of):
    """Return a function that gives the graphs before and behind this pass, and its counts."""

    def of(model="llama", phase="decode", **settings):
        plan = plan_of(model, phase, **settings)
        names = [s.name for s in plan.stages]
        record = plan.stages[names.index("fuse_selection")]
        before = plan.stages[names.index("fuse_selection") - 1]
        return before.graph_module, record.graph_module, record.counts

    return of


def named(graph, name):
    return next(n for n in graph.nodes if n.name == name)


@pytest.mark.parametrize("case", CASES)
def test_counts(stages, case):
    settings, (num_fused, num_left) = CASES[case]
    before, after, counts = stages(**settings)
    assert counts == {"fused": num_fused, "left": num_left}
    assert len(find_ops(after.graph, "select_pages")) == num_fused
    assert len(find_ops(after.graph, "plan_pages")) == num_left
    gone = len(find_ops(before.graph, "select_blocks")) - num_fused
    assert len(find_ops(after.graph, "select_blocks")) == gone
    if not num_fused:
        assert graph_text(before.graph) == graph_text(after.graph)


@pytest.mark.parametrize("case", CASES)
def test_users_of_each_result_keep_its_meaning(stages, case):
    before, after, _ = stages(**CASES[case][0])
    for item in after.graph.nodes:
        if call_name(item) != "getitem" or item.args[0] not in find_ops(
            after.graph, "select_pages"
        ):
            continue
        if item.args[1] == 0:
            old = named(before.graph, item.name.replace("picked_ids", "block_ids"))
            assert call_name(old) == "sparda.select_blocks"
            assert HINTS.get(item) == HINTS.get(old)
            users = {u.name for u in old.users if call_name(u) != "sparda.plan_pages"}
        else:
            old = named(before.graph, item.name)
            assert item.args[1] == old.args[1] + 1
            users = {u.name for u in old.users}
        assert {u.name for u in item.users} == users
        assert fake_value(item).shape == fake_value(old).shape
        assert fake_value(item).dtype == fake_value(old).dtype
        # What attention reads is the page of each id, and the id: not one for the other.
        for user in item.users:
            earlier = named(before.graph, user.name)
            at = [i for i, a in enumerate(user.args) if a is item]
            assert at == [i for i, a in enumerate(earlier.args) if a is old]


def test_arguments_are_those_of_the_two_ops(stages):
    settings = {"top_k": 4, "sink_blocks": 1, "local_blocks": 2, "eviction": "fifo"}
    before, after, _ = stages(mode="exact", **settings)
    for layer in (0, 1):
        ids, plan = (named(before.graph, f"hint_{n}_{layer}") for n in ("block_ids", "plan"))
        fused = named(after.graph, f"hint_select_pages_{layer}")
        for source in (ids, plan):
            for entry in source.target._schema.arguments:
                if entry.name != "block_ids":
                    want, got = argument(source, entry.name), argument(fused, entry.name)
                    assert getattr(got, "name", got) == getattr(want, "name", want), entry.name
        sizes = ("num_selected", "block_size", "sink_blocks", "local_blocks")
        assert [argument(fused, name) for name in sizes] == [8, 64, 1, 2]
        assert argument(fused, "eviction") == "fifo"
        assert argument(fused, "is_hint") is True


def test_fused_op_stands_where_the_plan_stood(stages):
    before, after, _ = stages(mode="forecast")
    order = [n.name for n in before.graph.nodes]
    place = program_order(after.graph)
    for layer in (0, 1):
        fused = named(after.graph, f"select_pages_{layer}")
        at = order.index(f"plan_{layer}")
        assert place[named(after.graph, order[at + 1])] > place[fused]
        earlier = [n for n in order[:at] if n != f"block_ids_{layer}"]
        for name in earlier:
            if not name.startswith(("block_ids", "plan")):
                assert place[named(after.graph, name)] < place[fused]
        assert LAYER.of(fused) == layer
        assert fused.meta["stack_trace"] == named(before.graph, f"plan_{layer}").meta["stack_trace"]


def test_ids_with_two_plans_are_left_to_both(stages):
    """One of the plans goes to the copy stream; ids that it made would come too late."""
    _, after, _ = stages(mode="exact", hint="previous_layer", machine="h200")
    ids = named(after.graph, "block_ids_0")
    assert {u.name for u in ids.users} >= {"plan_0", "hint_plan_1"}


def test_keepalives_are_made_anew(stages, plan_of):
    before, after, _ = stages(mode="exact")
    want = {w.name: argument(w, "keepalive") for w in find_ops(after.graph, "wait_blocks")}
    assert all(want.values())
    gm = snapshot(before)
    for wait in find_ops(gm.graph, "wait_blocks"):
        set_argument(wait, "keepalive", [named(gm.graph, "block_ids_0")])
    FuseSelection()(gm, context(plan_of))
    got = {w.name: argument(w, "keepalive") for w in find_ops(gm.graph, "wait_blocks")}
    assert {k: [n.name for n in v] for k, v in got.items()} == {
        k: [n.name for n in v] for k, v in want.items()
    }


def context(plan_of, **settings):
    plan = plan_of("llama", mode="exact", **settings)
    return PassContext(plan.layout.config, "decode", {}, "Model", plan.layout, MACHINES["cpu"])


def test_second_run_is_refused(stages, plan_of):
    before, _, counts = stages(mode="exact")
    gm = snapshot(before)
    FACTS.put(
        gm,
        frozenset(
            {
                Fact.SITES_TAGGED,
                Fact.ATTENTION_REPLACED,
                Fact.FORECAST_INSERTED,
                Fact.TRANSFERS_ASYNC,
            }
        ),
    )
    (record,) = run_passes(gm, [FuseSelection()], context(plan_of))
    assert record.counts == counts
    assert Fact.SELECTION_FUSED in FACTS.of(gm)
    with pytest.raises(PassError, match="fuse_selection has already run"):
        run_passes(gm, [FuseSelection()], context(plan_of))


def test_graph_without_its_scores_in_place_is_refused(stages, plan_of):
    before, _, _ = stages(mode="exact")
    with pytest.raises(PassError, match="fuse_selection requires FORECAST_INSERTED"):
        run_passes(snapshot(before), [FuseSelection()], context(plan_of))


@pytest.mark.parametrize("mode", ["forecast", "query", "exact"])
def test_disabled_pass_leaves_the_ops_apart(plan_of, mode):
    plan = plan_of("llama", mode=mode, machine="h200", disable_passes=("fuse_selection",))
    assert "fuse_selection" not in [s.name for s in plan.stages]
    assert not find_ops(plan.graph_module.graph, "select_pages")
    # Scheduled and proven without it, too.
    assert plan.stages[-1].name == "verify_transfers"
