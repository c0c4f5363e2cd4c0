"""Random shapes of every family: what is found is what the config says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sparda_compile import SpardaConfig, explain, optimize
from sparda_compile.testing import TINY_MODELS, build

CONFIG = SpardaConfig(mode="query", top_k=None, block_size=16, lowering="eager", max_tokens=128)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the config, or the plain module, says of one attention."""

    layer: int
    num_heads: int
    num_groups: int
    head_dim: int
    scale: float
    window: int
    position: str


def expected_of(name: str, model: Any) -> list[Expected]:
    if name == "plain":
        rope = "rope" if model.position_embedding is None else "none"
        blocks = enumerate(block.attention for block in model.blocks)
        return [
            Expected(i, a.num_heads, a.num_groups, a.head_dim, a.head_dim**-0.5, 0, rope)
            for i, a in blocks
        ]
    config = model.config
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    expected = []
    for layer, kind in enumerate(kinds):
        scale = getattr(config, "query_pre_attn_scalar", head_dim) ** -0.5
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            scale /= layer + 1
        window = config.sliding_window if kind == "sliding_attention" else 0
        num_groups = getattr(config, "num_key_value_heads", num_heads)
        position = "none" if name == "gpt2" else "rope"
        expected.append(Expected(layer, num_heads, num_groups, head_dim, scale, window, position))
    return expected


def check(name: str, model: Any, report: Any, attn: str) -> None:
    assert report.error == ""
    expected = expected_of(name, model)
    assert len(report.sparse_sites) + len(report.dense_sites) == len(expected)
    for site, want in zip(report.sites, expected, strict=True):
        got = {field.name: getattr(site, field.name) for field in dataclasses.fields(want)}
        assert got == dataclasses.asdict(want) | {"scale": pytest.approx(want.scale, rel=1e-4)}
        assert site.kind == ("window" if want.window else "sparse")
        assert site.form == attn


def forms(name: str) -> tuple[Any, ...]:
    return ("sdpa",) if name == "plain" else ("sdpa", "eager")


# Each shape with one attention implementation: tracing is what takes time here.
@pytest.mark.parametrize(
    ("name", "attn"), [(n, forms(n)[i % len(forms(n))]) for i, n in enumerate(TINY_MODELS)]
)
def test_first_shape_is_found_and_generates_the_same_tokens(name: str, attn: Any) -> None:
    model = build(name, 1, attn_implementation=attn)
    fast = optimize(model, CONFIG)
    check(name, model, explain(fast, CONFIG), attn)
    ids = torch.randint(0, 256, (1, 70), generator=torch.Generator().manual_seed(1))
    want = ids
    if hasattr(model, "generate"):
        want = model.generate(ids, max_new_tokens=8, do_sample=False)
    else:
        for _ in range(8):
            want = torch.cat([want, model(want)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(fast.generate(ids, max_new_tokens=8, do_sample=False), want)


@pytest.mark.parametrize(
    ("name", "attn"), [(n, forms(n)[(i + 1) % len(forms(n))]) for i, n in enumerate(TINY_MODELS)]
)
def test_another_shape_is_found(name: str, attn: Any) -> None:
    model = build(name, 2, attn_implementation=attn)
    check(name, model, explain(model, CONFIG), attn)


def test_mask_of_a_window_is_traced_although_the_prompt_is_short() -> None:
    model = build("gemma3", 3, attn_implementation="sdpa")
    assert model.config.sliding_window == 96
    check("gemma3", model, explain(model, CONFIG), "sdpa")
