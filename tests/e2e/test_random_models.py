"""Random shapes of every family: what is found is what the config says."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.testing import TINY_MODELS, build
from sparda_compile.traced import captures_of

if TYPE_CHECKING:
    from sparda_compile.program import Captures

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


def forms(name: str, first: int = 0) -> tuple[Any, ...]:
    """Return the attention implementations of a family, rotated."""
    if name == "plain":
        return ("sdpa",)
    return ("eager", "sdpa") if first % 2 else ("sdpa", "eager")


def check_both_forms(name: str, seed: int, captures: dict[str, Captures], rewrite: Any) -> None:
    """Check the phase that has a mask in each form, and that both give the same program."""
    programs = {attn: rewrite(captures[attn], "prefill") for attn in forms(name)}
    for attn, program in programs.items():
        check(name, build(name, seed), program.sites, attn)
        assert program.lines == programs["sdpa"].lines


# Tracing is what takes time here: the first shape is seen by both forms, the second by one and the
# third by the other. A decode, which has no mask, is traced of the first two, with one form each.
@pytest.mark.parametrize("name", TINY_MODELS)
def test_first_shape_is_found_and_generates_the_same_tokens(rewrite: Any, name: str) -> None:
    attn, *others = forms(name, first=list(TINY_MODELS).index(name))
    model = build(name, 1, attn_implementation=attn)
    fast = optimize(model, CONFIG)
    captures = {a: captures_of(build(name, 1, attn_implementation=a)) for a in others}
    check_both_forms(name, 1, captures | {attn: fast.captures}, rewrite)
    check(name, model, fast.latest_plan("decode").sites, attn)
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
    attn = forms(name, first=1 + list(TINY_MODELS).index(name))[0]
    model = build(name, 2, attn_implementation=attn)
    captures = captures_of(model)
    for phase in ("prefill", "decode"):
        check(name, model, rewrite(captures, phase).sites, attn)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_third_shape_is_found(rewrite: Any, name: str) -> None:
    attn = forms(name, first=list(TINY_MODELS).index(name))[0]
    model = build(name, 3, attn_implementation=attn)
    check(name, model, rewrite(captures_of(model), "prefill").sites, attn)


def test_one_window_is_longer_than_short_prompts() -> None:
    """Its mask, which the tests above prove, would not be there if a short prompt were traced."""
    assert build("gemma3", 3).config.sliding_window == 96
