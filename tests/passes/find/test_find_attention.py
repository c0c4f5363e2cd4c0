from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from sparda_compile.capture.causal_lm import as_causal_lm
from sparda_compile.capture.forward import CapturedGraph, capture
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import AttentionNotFoundError, PassError, UnsupportedInputError
from sparda_compile.graph.nodes import call_name, fake_value, tensor_shape
from sparda_compile.graph.site import AttentionSite, sites_of
from sparda_compile.graph.tags import FACTS, SITE
from sparda_compile.passes.base import Fact, PassContext
from sparda_compile.passes.find.find_attention import FindAttention
from sparda_compile.passes.machine import MACHINES
from sparda_compile.passes.manager import run_passes
from sparda_compile.sizes import SAMPLES
from sparda_compile.testing import PlainCausalLM
from sparda_compile.testing.plain import PlainAttention
from sparda_compile.testing.unsupported import BidirectionalLM, InterleavedLM, PrefixLM

PHASES = ("prefill", "decode")


def context(phase: str, windows: dict[int, int] | None = None, weights: Any = None) -> PassContext:
    return PassContext(
        SpardaConfig(), phase, windows or {}, "Model", None, MACHINES["cpu"], 1, weights or {}
    )


def find(
    captured: CapturedGraph, windows: dict[int, int] | None = None
) -> tuple[fx.GraphModule, dict[str, int]]:
    gm = captured.copy()
    ctx = context(captured.phase, windows, captured.weights)
    (record,) = run_passes(gm, [FindAttention()], ctx)
    return gm, record.counts


def calls(gm: fx.GraphModule) -> list[tuple[str, Any, int]]:
    return [(node.op, node.target, len(node.all_input_nodes)) for node in gm.graph.nodes]


def find_in(model: nn.Module, phase: str = "prefill") -> list[AttentionSite]:
    captured = capture(as_causal_lm(model), phase, last_logits_only=True)
    gm, counts = find(captured)
    assert counts == {"sites": 2, "sparse": 2, "window": 0}
    return sites_of(gm.graph)


@pytest.mark.parametrize("phase", PHASES)
def test_sites_are_tagged_and_counted(captures_of: Any, phase: str) -> None:
    captured = captures_of("llama").get(phase)
    gm, counts = find(captured)
    assert counts == {"sites": 2, "sparse": 2, "window": 0}
    assert FACTS.of(gm) == {Fact.SITES_TAGGED}
    tagged = [node for node in gm.graph.nodes if SITE.on(node)]
    assert [call_name(node) for node in tagged] == ["scaled_dot_product_attention"] * 2
    for layer, (node, site) in enumerate(zip(tagged, sites_of(gm.graph), strict=True)):
        assert SITE.of(node) is site
        assert site.anchor is node
        assert (site.layer, site.module) == (layer, f"model.layers.{layer}.self_attn")
        assert (site.form, site.kind) == ("sdpa", "sparse")
        assert (site.num_heads, site.num_groups, site.head_dim) == (4, 2, 16)
        assert (site.scale, site.softcap, site.window) == (16**-0.5, 0.0, 0)
        assert tensor_shape(site.query)[:2] == (SAMPLES.batch, 4)
        assert tensor_shape(site.k)[:2] == tensor_shape(site.v)[:2] == (SAMPLES.batch, 2)
        assert tensor_shape(site.hidden)[2] == 64
        assert call_name(site.projection) == "linear"


@pytest.mark.parametrize("phase", PHASES)
def test_only_names_and_metadata_change(captures_of: Any, phase: str) -> None:
    captured = captures_of("llama").get(phase)
    gm, _ = find(captured)
    assert calls(gm) == calls(captured.graph_module)


def test_layers_keep_their_own_kind(captures_of: Any) -> None:
    captures = captures_of("gemma3")
    assert captures.windows == {0: 16, 1: 0}
    for phase in PHASES:
        captured = captures.get(phase)
        gm, counts = find(captured, captures.windows)
        assert counts == {"sites": 2, "sparse": 1, "window": 1}
        assert [(site.kind, site.window) for site in sites_of(gm.graph)] == [
            ("window", 16),
            ("sparse", 0),
        ]


@pytest.mark.parametrize("windows", [{}, {0: 15}, {0: 17}, {0: 16, 1: 16}])
def test_windows_that_the_graph_does_not_have_are_refused(
    captures_of: Any, windows: dict[int, int]
) -> None:
    captured = captures_of("gemma3").get("prefill")
    with pytest.raises(AttentionNotFoundError, match=r"layer [01].*not causal attention"):
        find(captured, windows)


def test_second_run_is_refused(captures_of: Any) -> None:
    captured = captures_of("llama").get("decode")
    gm, _ = find(captured)
    with pytest.raises(PassError, match="find_attention has already run"):
        run_passes(gm, [FindAttention()], context("decode", weights=captured.weights))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("group_form", ["enable_gqa", "repeat_interleave"])
def test_hand_made_module_is_found(group_form: Any, phase: str) -> None:
    sites = find_in(PlainCausalLM(group_form=group_form, num_heads=6, num_groups=3), phase)
    for layer, site in enumerate(sites):
        assert (site.layer, site.module) == (layer, f"module.blocks.{layer}.attention")
        assert (site.num_heads, site.num_groups, site.head_dim) == (6, 3, 16)
        assert call_name(site.hidden) == "layer_norm"
        assert site.scale == 16**-0.5
        assert site.rotation


def with_attention(attention: type[PlainAttention], **settings: Any) -> nn.Module:
    model_class = type("HandMade", (PlainCausalLM,), {"attention_class": attention})
    model: nn.Module = model_class(**settings)
    return model


class SoftmaxAttention(PlainAttention):
    """Attention in the open, with a scale of its own and a soft cap."""

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        repeats = self.num_heads // self.num_groups
        k_BHTD = k_BGTD.repeat_interleave(repeats, dim=1)
        v_BHTD = v_BGTD.repeat_interleave(repeats, dim=1)
        scores = q_BHTD @ k_BHTD.transpose(-1, -2) * 0.3
        scores = 5.0 * torch.tanh(scores / 5.0)
        steps = torch.arange(q_BHTD.shape[2])
        later = steps[None] > steps[:, None]
        return scores.masked_fill(later, float("-inf")).softmax(-1) @ v_BHTD


def test_scale_and_soft_cap_are_measured() -> None:
    for site in find_in(with_attention(SoftmaxAttention)):
        assert (site.form, site.num_groups) == ("eager", 2)
        assert site.scale == pytest.approx(0.3, rel=1e-5)
        assert site.softcap == pytest.approx(5.0, rel=1e-5)


class ScaledAttention(PlainAttention):
    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(
            q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=True, scale=0.7
        )


def test_given_scale_is_taken() -> None:
    assert [site.scale for site in find_in(with_attention(ScaledAttention))] == [0.7, 0.7]


class SinkAttention(PlainAttention):
    """A key before the first one, which takes weight away from every token."""

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        sink = torch.zeros_like(k_BGTD[:, :, :1])
        return functional.scaled_dot_product_attention(
            q_BHTD,
            torch.cat([sink, k_BGTD], dim=2),
            torch.cat([sink, v_BGTD], dim=2),
            is_causal=True,
            enable_gqa=True,
        )


class LearnedBiasAttention(PlainAttention):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.bias = nn.Parameter(torch.zeros(1))

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        steps = torch.arange(q_BHTD.shape[2])
        bias = torch.where(steps[None] > steps[:, None], float("-inf"), self.bias)
        return functional.scaled_dot_product_attention(
            q_BHTD, k_BGTD, v_BGTD, attn_mask=bias, enable_gqa=True
        )


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (InterleavedLM, "another grouping of heads"),
        (BidirectionalLM, "another mask"),
        (PrefixLM, "another mask"),
        (lambda: with_attention(SinkAttention), "query tokens meet .* keys .* sinks"),
        (lambda: with_attention(LearnedBiasAttention), "reads the parameter"),
    ],
)
def test_wrong_attention_is_refused_with_its_place(make: Any, reason: str) -> None:
    with pytest.raises(AttentionNotFoundError, match=reason) as refusal:
        find_in(make())
    assert "layer 0 (module.blocks.0.attention" in str(refusal.value)


def test_graph_without_attention_is_refused() -> None:
    graph = fx.Graph()
    ids = graph.placeholder("l_input_ids_")
    ids.meta["val"] = torch.zeros(1, 1)
    graph.output((graph.call_method("relu", (ids,)),))
    gm = fx.GraphModule({}, graph)
    with pytest.raises(AttentionNotFoundError, match="Model has no attention"):
        FindAttention()(gm, context("decode"))


def test_attention_that_leaves_a_layer_out_is_refused(captures_of: Any) -> None:
    captured = captures_of("llama").get("decode")
    gm = captured.copy()
    anchor = next(n for n in gm.graph.nodes if call_name(n) == "scaled_dot_product_attention")
    with gm.graph.inserting_before(anchor):
        other = gm.graph.call_function(torch.add, (anchor.args[0], anchor.args[1]))
    other.meta["val"] = fake_value(anchor)
    anchor.replace_all_uses_with(other)
    gm.graph.erase_node(anchor)
    with pytest.raises(AttentionNotFoundError, match=r"layer 0 .*its keys do not lead to"):
        run_passes(gm, [FindAttention()], context("decode", weights=captured.weights))


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_retention_is_looked_for_where_it_is_needed(plan_of: Any, model: str) -> None:
    """Rotated or not, fused or not: an ordinary query does not end in 1."""
    with pytest.raises(UnsupportedInputError, match=r"layer 0 \(.*attn\).*not always 1.*models.md"):
        plan_of(model, mode="query", selector="nosa")
    plan_of(model, mode="dense", selector="nosa")
