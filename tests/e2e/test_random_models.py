"""Random shapes of every family: what is found is what the config says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.module.captures_of import captures_of
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


def check(name: str, model: Any, sites: Any, attn: str) -> None:
    for site, want in zip(sites, expected_of(name, model), strict=True):
        position = "rope" if site.rotation else "none"
        fields = [f.name for f in dataclasses.fields(want) if f.name != "position"]
        got = {name: getattr(site, name) for name in fields} | {"position": position}
        assert got == dataclasses.asdict(want) | {"scale": pytest.approx(want.scale, rel=1e-4)}
        assert site.kind == ("window" if want.window else "sparse")
        assert site.form == attn


def form_of(name: str, shape: int) -> Any:
    """Return an attention implementation, another one for each shape and for each neighbour."""
    is_eager = name != "plain" and (list(TINY_MODELS).index(name) + shape) % 2 == 0
    return "eager" if is_eager else "sdpa"


# Tracing is what takes time here: a shape is seen in one form. That both forms of one model give
# the same program is in test_models.py.
@pytest.mark.parametrize("name", TINY_MODELS)
def test_first_shape_is_found_and_generates_the_same_tokens(name: str) -> None:
    attn = form_of(name, 1)
    model = build(name, 1, attn_implementation=attn)
    fast = optimize(model, CONFIG)
    for phase in ("prefill", "decode"):
        check(name, model, fast.programs.latest_plan(phase).sites, attn)
    ids = torch.randint(0, 256, (1, 70), generator=torch.Generator().manual_seed(1))
    want = ids
    if hasattr(model, "generate"):
        want = model.generate(ids, max_new_tokens=8, do_sample=False)
    else:
        for _ in range(8):
            want = torch.cat([want, model(want)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(fast.generate(ids, max_new_tokens=8, do_sample=False), want)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_second_shape_is_found(rewrite: Any, name: str) -> None:
    check_shape(rewrite, name, 2)


def test_window_that_is_longer_than_short_prompts_is_found(rewrite: Any) -> None:
    """Its mask would not be there if a short prompt were traced."""
    assert build("gemma3", 3).config.sliding_window == 96
    check_shape(rewrite, "gemma3", 3)


def check_shape(rewrite: Any, name: str, shape: int) -> None:
    attn = form_of(name, shape)
    model = build(name, shape, attn_implementation=attn)
    captures = captures_of(model)
    for phase in ("prefill", "decode"):
        check(name, model, rewrite(captures, phase).sites, attn)
