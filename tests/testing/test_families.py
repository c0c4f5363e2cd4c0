from __future__ import annotations

import pytest
import torch

from sparda_compile.testing import FAMILIES, TINY_MODELS, build_form

FORMS = [(name, form) for name, family in FAMILIES.items() for form in ("", *family.forms)]


def fields_of(name, form):
    return FAMILIES[name].fields | (FAMILIES[name].forms[form] if form else {})


WINDOWED = [
    (name, form)
    for name, form in FORMS
    if fields_of(name, form).get("sliding_window")
    and "sliding_attention" in fields_of(name, form).get("layer_types", ["sliding_attention"])
]


def prompt(num_tokens=65):
    return torch.randint(0, 256, (1, num_tokens), generator=torch.Generator().manual_seed(1))


def make(name, form="", **given):
    return build_form(name, form, attn_implementation=FAMILIES[name].attentions[0], **given)


@torch.no_grad()
def last_logits(model, ids):
    return model(ids).logits[0, -1]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_what_stands_before_decides_what_comes_next(name, form):
    """A rewrite that loses attention cannot go unseen."""
    model, ids = make(name, form), prompt()
    other = ids.clone()
    other[:, :-1] = (other[:, :-1] + 101) % 256
    logits = last_logits(model, ids)
    change = (logits - last_logits(model, other)).abs().max()
    assert change > 0.03 * (logits.max() - logits.min())
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "form"), WINDOWED)
def test_windows_are_narrower_than_the_prompts(name, form):
    model, ids = make(name, form), prompt()
    kinds = model.config.layer_types if hasattr(model.config, "layer_types") else None
    logits = last_logits(model, ids)
    wide = make(name, form)
    wide.config.sliding_window = 4096
    for module in wide.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 4096
    change = (logits - last_logits(wide, ids)).abs().max()
    assert change > 1e-3 * (logits.max() - logits.min())
    assert kinds is None or "sliding_attention" in kinds


def test_every_family_with_windows_is_among_them():
    assert {name for name, _ in WINDOWED} == {
        "starcoder2", "cohere2", "olmo3", "smollm3", "exaone4", "qwen2_moe", "dots1", "gemma2",
        "afmoe",
    }  # fmt: skip


def test_weights_follow_the_seed_and_leave_the_global_state():
    before = torch.get_rng_state()
    first, second, other = (make("phi", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_family_is_a_tiny_model_too():
    assert not FAMILIES.keys() & TINY_MODELS.keys()
    with pytest.raises(KeyError):
        build_form("elephant")
    with pytest.raises(KeyError):
        build_form("phi", "elephant")
