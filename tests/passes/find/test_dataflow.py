from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sparda_compile.capture.causal_lm import as_causal_lm
from sparda_compile.capture.forward import CapturedGraph, capture
from sparda_compile.config import SpardaConfig
from sparda_compile.graph.evaluate import evaluate
from sparda_compile.graph.nodes import call_name, fake_value, module_path, tensor_shape
from sparda_compile.graph.site import AttentionSite, sites_of
from sparda_compile.passes.base import PassContext
from sparda_compile.passes.find.dataflow import LINEAR, Dataflow, RefusedAttentionError
from sparda_compile.passes.find.find_attention import FindAttention
from sparda_compile.passes.machine import MACHINES
from sparda_compile.sizes import concrete
from sparda_compile.testing import PlainCausalLM
from sparda_compile.testing.plain import PlainAttention


def sites_in(captures: Any, phase: str = "prefill") -> tuple[list[AttentionSite], CapturedGraph]:
    captured = captures.get(phase, last_logits_only=True)
    gm = captured.copy()
    ctx = PassContext(
        SpardaConfig(), phase, captures.windows, "Model", None, MACHINES["cpu"], 1, captured.weights
    )
    FindAttention()(gm, ctx)
    return sites_of(gm.graph), captured


def plain_graph(model: nn.Module) -> fx.Graph:
    captured = capture(as_causal_lm(model), "prefill", last_logits_only=True)
    return captured.graph_module.graph


def operands(graph: fx.Graph) -> list[Any]:
    """Return query, key and value of the first attention."""
    anchor = next(n for n in graph.nodes if call_name(n) == "scaled_dot_product_attention")
    return list(anchor.args[:3])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_hidden_feeds_all_three_projections(captures_of: Any, phase: str) -> None:
    sites, _ = sites_in(captures_of("llama"), phase)
    for site in sites:
        fed = {
            module_path(user).rsplit(".", maxsplit=1)[-1]
            for user in site.hidden.users
            if call_name(user) in LINEAR
        }
        assert fed == {"q_proj", "k_proj", "v_proj"}
        assert tensor_shape(site.hidden)[2] == 64
        assert site.projection in site.hidden.users
        assert module_path(site.projection) == f"{site.module}.q_proj"


@pytest.mark.parametrize(
    ("model", "projection", "width"), [("phi3", "qkv_proj", 64), ("gpt2", "c_attn", 64)]
)
def test_fused_projection_is_found_from_its_input(
    captures_of: Any, model: str, projection: str, width: int
) -> None:
    sites, _ = sites_in(captures_of(model))
    for site in sites:
        assert module_path(site.projection).endswith(projection)
        assert call_name(site.projection) in LINEAR
        assert len(tensor_shape(site.hidden)) == 3
        assert tensor_shape(site.hidden)[2] == width
        assert not [n for n in site.hidden.users if call_name(n) == "split"]
    # Another layer, another tensor.
    assert sites[0].hidden is not sites[1].hidden


def rotated(site: AttentionSite, captured: CapturedGraph, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return random unrotated queries and what the nodes of the rotation make of them."""
    generator = torch.Generator().manual_seed(0)
    shape = concrete(tensor_shape(site.rotation_input), 2, num_tokens)
    before = torch.randn(shape, generator=generator)
    return before, evaluate(site.query, {site.rotation_input: before}, captured.weights, num_tokens)


def test_rotation_turns_pairs_by_position_and_keeps_lengths(captures_of: Any) -> None:
    sites, captured = sites_in(captures_of("llama"))
    before, after = rotated(sites[1], captured, 9)
    assert before.shape == after.shape == (2, 4, 9, 16)
    torch.testing.assert_close(after[:, :, 0], before[:, :, 0])
    assert (after[:, :, 1:] - before[:, :, 1:]).abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    assert site_nodes_are_ordered(sites[1])


def site_nodes_are_ordered(site: AttentionSite) -> bool:
    place = {node: i for i, node in enumerate(site.anchor.graph.nodes)}
    places = [place[node] for node in (site.rotation_input, *site.rotation)]
    return places == sorted(places) and site.rotation[-1] is site.query


def test_partial_rotation_leaves_the_other_half_alone(captures_of: Any) -> None:
    sites, captured = sites_in(captures_of("glm4"))
    for site in sites:
        before, after = rotated(site, captured, 9)
        assert before.shape == after.shape == (2, 4, 9, 16)
        torch.testing.assert_close(after[..., 8:], before[..., 8:], rtol=0, atol=0)
        torch.testing.assert_close(after[:, :, 0], before[:, :, 0])
        assert (after[:, :, 1:, :8] - before[:, :, 1:, :8]).abs().amax(-1).min() > 1e-3


def test_rotation_begins_behind_the_query_norm(captures_of: Any) -> None:
    sites, _ = sites_in(captures_of("qwen3"))
    for site in sites:
        assert not [n for n in site.rotation if module_path(n).endswith("q_norm")]
        assert call_name(site.rotation_input) == "transpose"


def test_learned_positions_are_no_rotation(captures_of: Any) -> None:
    sites, _ = sites_in(captures_of("gpt2"))
    for site in sites:
        assert site.rotation_input is site.query
        assert site.rotation == ()


def test_sizes_are_no_flow() -> None:
    graph = plain_graph(PlainCausalLM())
    query, _, _ = operands(graph)
    with graph.inserting_after(query):
        size = graph.call_method("size", (query,))
    with graph.inserting_after(size):
        number = graph.call_function(operator.getitem, (size, 1))
    with graph.inserting_after(number):
        ones = graph.call_function(torch.ones, (number,))
    with graph.inserting_after(ones):
        doubled = graph.call_method("add", (query, query))
    size.meta["val"], number.meta["val"] = fake_value(query).shape, 4
    ones.meta["val"], doubled.meta["val"] = torch.ones(4), fake_value(query)
    active = Dataflow(graph).active
    assert {query, doubled} <= active
    assert not {size, number, ones} & active


class BottleneckAttention(PlainAttention):
    """Queries pass through eight numbers."""

    def __init__(self, hidden_size: int, num_heads: int, *args: Any) -> None:
        super().__init__(hidden_size, num_heads, *args)
        wide = num_heads * self.head_dim
        self.query = nn.Sequential(  # type: ignore[assignment]
            nn.Linear(hidden_size, 8, bias=False), nn.Linear(8, wide, bias=False)
        )


class ValueKeyAttention(PlainAttention):
    """Keys take a channel from the token's value, as retention scores are."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.delta = nn.Linear(self.head_dim, 1, bias=False)

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        score = self.delta(v_BGTD)
        return super().attend(q_BHTD, torch.cat([k_BGTD[..., 1:], score], -1), v_BGTD)


class KeyBottleneckAttention(PlainAttention):
    """Keys pass through eight numbers."""

    def __init__(self, hidden_size: int, num_heads: int, *args: Any) -> None:
        super().__init__(hidden_size, num_heads, *args)
        wide = self.num_groups * self.head_dim
        self.key = nn.Sequential(  # type: ignore[assignment]
            nn.Linear(hidden_size, 8, bias=False), nn.Linear(8, wide, bias=False)
        )


class UnprojectedAttention(PlainAttention):
    """Queries are the hidden states themselves."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.query = nn.Identity()  # type: ignore[assignment]


class ConstantKeyAttention(PlainAttention):
    """Keys do not know the tokens."""

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        constant = torch.ones(k_BGTD.shape, dtype=k_BGTD.dtype)
        return super().attend(q_BHTD, constant, v_BGTD)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (BottleneckAttention, "low-rank bottleneck"),
        (KeyBottleneckAttention, "low-rank bottleneck"),
        (UnprojectedAttention, "not made by a linear projection"),
        (ConstantKeyAttention, "its key does not depend on the input tokens"),
    ],
)
def test_projections_that_are_not_one_linear_are_refused(
    attention: type[PlainAttention], reason: str
) -> None:
    model = type("HandMade", (PlainCausalLM,), {"attention_class": attention})()
    graph = plain_graph(model)
    with pytest.raises(RefusedAttentionError, match=reason):
        Dataflow(graph).hidden(*operands(graph))


class LowRankSum(nn.Module):
    """A full linear, and two narrow ones added to it, as an adapter is."""

    def __init__(self, hidden_size: int, wide: int) -> None:
        super().__init__()
        self.full = nn.Linear(hidden_size, wide, bias=False)
        self.narrow = nn.Sequential(nn.Linear(hidden_size, 4), nn.Linear(4, wide))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.full(x) + 2.0 * self.narrow(x)
        return out


class AdaptedAttention(PlainAttention):
    """Queries, keys and values have adapters."""

    def __init__(self, hidden_size: int, num_heads: int, *args: Any) -> None:
        super().__init__(hidden_size, num_heads, *args)
        for name in ("query", "key", "value"):
            wide = getattr(self, name).out_features
            setattr(self, name, LowRankSum(hidden_size, wide))


class TurnedAttention(PlainAttention):
    """Queries are made of turned hidden states; none of them is lost."""

    def __init__(self, hidden_size: int, num_heads: int, *args: Any) -> None:
        super().__init__(hidden_size, num_heads, *args)
        turn = nn.Linear(hidden_size, hidden_size, bias=False)
        self.query = nn.Sequential(turn, self.query)  # type: ignore[assignment]


@pytest.mark.parametrize("attention", [AdaptedAttention, TurnedAttention])
def test_what_is_added_or_turned_is_no_bottleneck(attention: type[PlainAttention]) -> None:
    model = type("HandMade", (PlainCausalLM,), {"attention_class": attention})()
    graph = plain_graph(model)
    hidden, projection = Dataflow(graph).hidden(*operands(graph))
    assert "query" in module_path(projection)
    assert module_path(hidden).endswith("norm_attention")


def test_keys_may_take_channels_from_the_value() -> None:
    model = type("HandMade", (PlainCausalLM,), {"attention_class": ValueKeyAttention})()
    graph = plain_graph(model)
    hidden, projection = Dataflow(graph).hidden(*operands(graph))
    assert module_path(projection).endswith("query")
    assert projection in hidden.users
