"""The manager: what runs, what is refused, what is kept."""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

import pytest
import torch
from torch import fx

from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError, GraphInvariantError, PassError
from sparda_compile.graph.nodes import snapshot
from sparda_compile.graph.tags import FACTS, SITE
from sparda_compile.graph.text import graph_text
from sparda_compile.passes import OPTIONAL_PASSES, PIPELINE
from sparda_compile.passes.base import Fact, PassContext, PassResult
from sparda_compile.passes.machine import MACHINES
from sparda_compile.passes.manager import check_disabled, run_passes


@dataclasses.dataclass(frozen=True)
class Tag:
    """Counts nodes; may fail on purpose."""

    error: Exception | None = None
    name: ClassVar[str] = "tag"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_TAGGED})
    preserves_numerics: ClassVar[bool] = True

    def __call__(self, gm, ctx):
        if self.error is not None:
            raise self.error
        return PassResult(gm, modified=False, counts={"nodes": len(gm.graph.nodes)})


@dataclasses.dataclass(frozen=True)
class Double(Tag):
    """Doubles the result."""

    name: ClassVar[str] = "double"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_TAGGED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFERS_ASYNC})

    def __call__(self, gm, ctx):
        output = next(n for n in gm.graph.nodes if n.op == "output")
        with gm.graph.inserting_before(output):
            twice = gm.graph.call_function(torch.mul, (output.args[0], 2))
        output.args = (twice,)
        return PassResult(gm, modified=True, counts={"doubled": 1})


@pytest.fixture
def gm():
    return fx.symbolic_trace(lambda x: torch.relu(x) + 1)


def context(**settings):
    return PassContext(SpardaConfig(**settings), "decode", {}, "Model", None, MACHINES["cpu"])


def test_passes_run_in_order_and_are_recorded(gm):
    records = run_passes(gm, [Tag(), Double()], context())
    assert [r.name for r in records] == ["tag", "double"]
    assert [r.counts for r in records] == [{"nodes": 4}, {"doubled": 1}]
    assert FACTS.of(gm) == {Fact.SITES_TAGGED, Fact.TRANSFERS_ASYNC}
    assert all(r.ms >= 0 and r.schedule is None for r in records)


def test_graph_is_recompiled(gm):
    run_passes(gm, [Tag(), Double()], context())
    assert gm(torch.tensor([3.0])).item() == 8.0


def test_records_keep_the_graph_as_it_was(gm):
    records = run_passes(gm, [Tag(), Double()], context())
    assert [len(r.graph_module.graph.nodes) for r in records] == [4, 5]
    assert records[1].graph_module is not gm


def test_pass_runs_once(gm):
    run_passes(gm, [Tag()], context())
    with pytest.raises(PassError, match=r"tag has already run .*SITES_TAGGED.* runs once"):
        run_passes(gm, [Tag()], context())


def test_what_a_pass_requires_must_hold(gm):
    with pytest.raises(PassError, match=r"double requires SITES_TAGGED, which does not hold"):
        run_passes(gm, [Double()], context())
    assert len(gm.graph.nodes) == 4


@pytest.mark.parametrize("graph_pass", PIPELINE, ids=lambda p: p.name)
def test_no_pass_of_the_pipeline_runs_twice(plan_of, graph_pass):
    plan = plan_of("llama", mode="query")
    ctx = dataclasses.replace(context(), layout=plan.layout)
    with pytest.raises(PassError, match=f"{graph_pass.name} has already run"):
        run_passes(plan.graph_module, [graph_pass], ctx)


def test_other_errors_are_wrapped_with_the_pass_and_the_model(gm):
    with pytest.raises(PassError) as caught:
        run_passes(gm, [Tag(KeyError("q_proj"))], context())
    assert str(caught.value) == "tag failed on the decode graph of Model: KeyError: 'q_proj'"
    assert isinstance(caught.value.__cause__, KeyError)


def test_errors_on_purpose_come_through_as_they_are(gm):
    error = GraphInvariantError("two ends")
    with pytest.raises(GraphInvariantError) as caught:
        run_passes(gm, [Tag(error)], context())
    assert caught.value is error


def test_broken_graph_is_found_behind_the_pass(gm):
    class Break(Tag):
        def __call__(self, gm, ctx):
            relu = next(n for n in gm.graph.nodes if n.op == "call_function")
            last = list(gm.graph.nodes)[-2]
            last.append(relu)
            return PassResult(gm, modified=True, counts={})

    with pytest.raises(RuntimeError, match="used before it has been defined"):
        run_passes(gm, [Break()], context())


def test_disabled_pass_is_left_out(gm):
    config = dataclasses.replace(SpardaConfig(), disable_passes=("tag",))
    ctx = dataclasses.replace(context(), config=config)
    assert run_passes(gm, [Tag()], ctx) == []
    assert not FACTS.on(gm)


def test_dump(gm, tmp_path):
    run_passes(gm, [Tag(), Double()], context(dump_dir=str(tmp_path / "dump")))
    files = {path.name: path.read_text() for path in (tmp_path / "dump").iterdir()}
    assert set(files) == {"decode_tag.txt", "decode_double.txt"}
    assert files["decode_double.txt"] == graph_text(gm.graph) + "\n"
    assert "mul(%add, 2)" in files["decode_double.txt"]


def test_one_line_of_log_for_each_pass(gm, caplog):
    with caplog.at_level(logging.DEBUG, logger="sparda_compile.passes.manager"):
        run_passes(gm, [Tag()], context(disable_passes=()))
    assert [r.getMessage().split(" in ")[0] for r in caplog.records] == ["decode tag: {'nodes': 4}"]


class TestDisabling:
    def check(self, *names):
        check_disabled(names, PIPELINE, OPTIONAL_PASSES)

    def test_nothing_and_what_is_optional(self):
        self.check()
        self.check("schedule_transfers")
        self.check("schedule_transfers", "insert_prefetch")

    def test_unknown_name(self):
        with pytest.raises(ConfigError, match=r"'prefetch', which is no pass; .*insert_prefetch"):
            self.check("prefetch")
        with pytest.raises(ConfigError, match=r"Did you mean 'insert_prefetch'\?"):
            self.check("insert_prefetches")

    @pytest.mark.parametrize("name", sorted({p.name for p in PIPELINE} - OPTIONAL_PASSES))
    def test_name_of_a_pass_that_is_needed(self, name):
        with pytest.raises(ConfigError, match=rf"'{name}', which cannot be left out"):
            self.check(name)

    def test_pass_that_another_one_needs(self):
        with pytest.raises(ConfigError, match=r"'insert_prefetch'.*name 'schedule_transfers' too"):
            self.check("insert_prefetch")


def test_snapshot_is_a_copy_with_names_and_metadata(plan_of):
    original = plan_of("llama", mode="query").graph_module
    copy = snapshot(original)
    for theirs, mine in zip(original.graph.nodes, copy.graph.nodes, strict=True):
        assert theirs is not mine
        assert (theirs.name, theirs.op, theirs.target) == (mine.name, mine.op, mine.target)
        known, same = ({k: v for k, v in n.meta.items() if k != "sparda"} for n in (theirs, mine))
        assert known == same
        # A site has nodes, and those of a copy are the copy's own; some may be gone.
        if SITE.on(theirs):
            assert SITE.of(mine).query in copy.graph.nodes
            assert repr(SITE.of(theirs)) == repr(SITE.of(mine))
    assert graph_text(copy.graph) == graph_text(original.graph)
    next(iter(copy.graph.nodes)).meta["mark"] = True
    assert "mark" not in next(iter(original.graph.nodes)).meta
