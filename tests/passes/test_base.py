"""What every pass of the pipeline promises about itself."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from sparda_compile.config import SpardaConfig
from sparda_compile.passes import OPTIONAL_PASSES, PIPELINE
from sparda_compile.passes.base import Fact, PassContext, PassResult
from sparda_compile.passes.machine import MACHINES


@pytest.mark.parametrize("graph_pass", PIPELINE, ids=lambda p: p.name)
class TestEachPass:
    def test_is_named_like_its_file(self, graph_pass):
        assert Path(inspect.getfile(type(graph_pass))).stem == graph_pass.name

    def test_is_a_frozen_dataclass(self, graph_pass):
        assert dataclasses.is_dataclass(graph_pass)
        with pytest.raises(dataclasses.FrozenInstanceError):
            graph_pass.option = 1

    def test_says_what_it_does(self, graph_pass):
        assert "Counts: " in type(graph_pass).__doc__ or graph_pass.name == "find_attention"
        assert type(graph_pass.preserves_numerics) is bool


def test_names_are_unique():
    assert len({p.name for p in PIPELINE}) == len(PIPELINE)


def test_each_pass_finds_what_it_requires_and_ensures_something_new():
    facts = set()
    for graph_pass in PIPELINE:
        assert graph_pass.requires <= facts, graph_pass.name
        assert graph_pass.ensures, graph_pass.name
        assert not graph_pass.ensures & facts, graph_pass.name
        facts |= graph_pass.ensures
    assert facts == set(Fact)


def test_what_can_be_left_out_changes_no_bit_but_for_sums_in_another_order():
    optional = {p.name: p for p in PIPELINE if p.name in OPTIONAL_PASSES}
    assert set(optional) == OPTIONAL_PASSES
    changing = {name for name, p in optional.items() if not p.preserves_numerics}
    assert changing == {"fuse_projections", "insert_speculation"}
    assert PIPELINE[-1].name == "verify_transfers" not in OPTIONAL_PASSES


@pytest.mark.parametrize(("phase", "expected"), [("prefill", False), ("decode", True)])
def test_context_knows_the_phase(phase, expected):
    ctx = PassContext(SpardaConfig(), phase, {}, "Model", None, MACHINES["cpu"])
    assert ctx.is_decode is expected


def test_result_has_no_schedule_unless_given():
    assert PassResult(None, modified=False, counts={}).schedule is None
