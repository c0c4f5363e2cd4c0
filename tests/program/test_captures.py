"""Traced forwards and their attentions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sparda_compile import SpardaConfig
from sparda_compile.capture.causal_lm import as_causal_lm, sliding_windows
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.passes import PIPELINE
from sparda_compile.program.captures import Captures
from sparda_compile.program.plan import Plan, make_plan
from sparda_compile.testing import UNSUPPORTED_MODELS, build, tiny_llama

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = SpardaConfig(mode="forecast", top_k=None, block_size=16, lowering="eager", max_tokens=64)


@pytest.fixture(scope="module")
def captures() -> Captures:
    model = tiny_llama(hidden_size=48)
    return Captures(as_causal_lm(model), sliding_windows(model))


def plan_of(captures: Captures, batch_size: int = 1, max_tokens: int = 64, **changes: Any) -> Plan:
    config = CONFIG.replace(max_tokens=max_tokens, **changes)
    return make_plan(captures, "decode", config, batch_size=batch_size, max_tokens=max_tokens)


def test_a_forward_is_traced_once(captures: Captures) -> None:
    first = captures.get("decode", last_logits_only=True)
    num_captures = captures.num_captures
    assert captures.get("decode", last_logits_only=True) is first
    assert captures.num_captures == num_captures
    captures.get("prefill", last_logits_only=True)
    assert captures.num_captures <= num_captures + 1
    assert captures.get("prefill", last_logits_only=True) is not first
    assert captures.model_name == "LlamaForCausalLM"


def test_layout_follows_the_sites(captures: Captures) -> None:
    plan = plan_of(captures, batch_size=3)
    assert [site.layer for site in plan.sites] == [0, 1]
    assert (plan.layout.batch_size, plan.layout.max_tokens) == (3, 64)
    shapes = [(s.kind, s.num_groups, s.head_dim, s.window) for s in plan.layout.layers]
    assert shapes == [("sparse", 2, 16, 0)] * 2


def test_a_window_is_no_longer_than_the_cache() -> None:
    model = as_causal_lm(build("gemma3", 3))
    windows = sliding_windows(model)
    plan = plan_of(Captures(model, windows), mode="query")
    assert windows == {0: 0, 1: 0, 2: 96}
    assert [shape.window for shape in plan.layout.layers] == [0, 0, 64]
    assert [site.window for site in plan.sites] == [0, 0, 96]


def test_forward_without_positions_is_refused() -> None:
    model = as_causal_lm(UNSUPPORTED_MODELS["no_position_ids"][0]())
    with pytest.raises(UnsupportedInputError, match="does not use position_ids"):
        plan_of(Captures(model, {}), mode="query")


def test_plans_of_a_model_find_its_attentions_once_and_share_no_graph(captures: Captures) -> None:
    one, other = (plan_of(captures, max_tokens=tokens) for tokens in (64, 128))
    for name in ("capture", "find_attention"):
        assert str(one.stage(name).graph) == str(other.stage(name).graph)
        assert one.stage(name).graph is not other.stage(name).graph
    for plan in (one, other):
        nodes = set(plan.graph_module.graph.nodes)
        assert all(site.hidden in nodes for site in plan.sites)


def test_attentions_are_found_once_for_all_configurations_but_for_each_selector() -> None:
    captures = Captures(as_causal_lm(tiny_llama()), {})
    one, other = (captures.sites("decode", CONFIG.replace(top_k=k)) for k in (2, 3))
    assert one.graph_module is other.graph_module
    assert (one.ctx.config.top_k, other.ctx.config.top_k) == (2, 3)
    with pytest.raises(UnsupportedInputError, match="reads a retention score"):
        captures.sites("decode", CONFIG.replace(selector="nosa"))
    for record, again in zip(one.records(), other.records(), strict=True):
        assert str(record.graph) == str(again.graph)
        assert record.graph is not again.graph
        assert record.graph is not one.graph_module.graph


def test_graphs_are_written_for_every_configuration_that_asks(tmp_path: Path) -> None:
    captures = Captures(as_causal_lm(tiny_llama()), {})
    for name in ("one", "other"):
        captures.sites("decode", CONFIG.replace(dump_dir=str(tmp_path / name)))
        assert (tmp_path / name / f"decode_{PIPELINE[0].name}.txt").read_text()


def test_sites_are_found_with_the_first_pass_of_the_pipeline(captures: Captures) -> None:
    found = captures.sites("decode", CONFIG)
    assert captures.sites("decode", CONFIG) is found
    assert [record.name for record in found.stages] == ["capture", PIPELINE[0].name]
    copy = found.copy()
    copy.graph.erase_node(next(n for n in reversed(copy.graph.nodes) if n.op == "output"))
    assert any(n.op == "output" for n in found.graph_module.graph.nodes)
    layout = found.layout(3, 128)
    context = found.context(layout)
    assert (layout.batch_size, layout.max_tokens) == (3, 128)
    assert (context.batch_size, context.layout) == (3, layout.traced())
