from __future__ import annotations

import math

import pytest
import torch

from sparda_compile.testing import tiny_nosa
from sparda_compile.testing.nosa import NosaForCausalLM


@pytest.fixture(scope="module")
def model():
    return tiny_nosa()


def prompt(batch, num_tokens):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, num_tokens), generator=generator)


@torch.no_grad()
def test_cached_generate_equals_the_whole_forward(model):
    sequence = model.generate(prompt(2, 50), max_new_tokens=20, do_sample=False)
    whole = model(sequence[:, :-1], use_cache=False)
    assert whole.past_key_values is None
    assert torch.equal(whole.logits[:, 49:].argmax(-1), sequence[:, 50:])


@torch.no_grad()
def test_eager_attention_is_the_same(model):
    eager = tiny_nosa(attn_implementation="eager")
    ids = prompt(1, 40)
    torch.testing.assert_close(eager(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_left_padding_does_not_change_a_row(model):
    ids = prompt(1, 20)
    padded = torch.cat([torch.zeros(1, 12, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(32) >= 12).long()[None]
    alone = model.generate(ids, max_new_tokens=12, do_sample=False)[:, 20:]
    beside = model.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(beside[:, 32:], alone)


@pytest.mark.parametrize(("size", "width"), [(14, 16), (16, 32), (20, 32), (128, 144)])
@torch.no_grad()
def test_keys_end_in_the_score_and_values_in_zeros(size, width):
    model = tiny_nosa(head_dim=size, num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    (layer,) = model(prompt(2, 9)).past_key_values.layers
    assert layer.keys.shape == layer.values.shape == (2, 2, 9, width)
    scores = attention.retention(layer.values[..., :size])
    torch.testing.assert_close(layer.keys[..., -1], scores / attention.scaling)
    assert layer.keys[..., size:-1].eq(0).all()
    assert layer.values[..., size:].eq(0).all()


@torch.no_grad()
def test_attention_weighs_each_token_by_its_score(model):
    """One head, one token: exp(q . k * scale) * exp(A * softplus(Delta v)), by hand."""
    attention = model.model.layers[0].self_attn
    seen = {}
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(out=args[0]))
    cache = model(prompt(1, 7)).past_key_values
    hidden = seen["hidden_states"][0]
    cos, sin = (table[0, -1] for table in seen["position_embeddings"])
    head, group = 3, 1
    plain = attention.q_proj(hidden)[-1, head * 16 : head * 16 + 16]
    query = plain * cos + torch.cat([-plain[8:], plain[:8]]) * sin
    keys = cache.layers[0].keys[0, group, :, :16]
    values = attention.v_proj(hidden)
    weights = []
    for t in range(7):
        row = attention.delta.weight[group]
        score = float(attention.amplitude[group]) * math.log1p(math.exp(float(row @ values[t])))
        weights.append(math.exp(float(query @ keys[t]) * 0.25) * math.exp(score))
    out = sum(w * values[t, 16:] for t, w in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(seen["out"][0, -1, head * 16 : head * 16 + 16], out)


@torch.no_grad()
def test_it_can_be_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = NosaForCausalLM.from_pretrained(tmp_path).eval()
    ids = prompt(1, 9)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
