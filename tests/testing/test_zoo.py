from __future__ import annotations

import pytest
import torch

from sparda_compile import testing
from sparda_compile.testing import zoo

NAMES = sorted(testing.TINY_MODELS)
PROMPT_TOKENS = 40


def prompt(seed=0, num_tokens=PROMPT_TOKENS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, num_tokens), generator=generator)


@torch.no_grad()
def logits_of(model, input_ids):
    out = model(input_ids)
    return getattr(out, "logits", out)


def generate(model, input_ids, num_tokens):
    """Decode greedily: with the cache where there is one, else by whole forwards."""
    if hasattr(model, "generate"):
        return model.generate(input_ids, max_new_tokens=num_tokens, do_sample=False)
    for _ in range(num_tokens):
        next_token = logits_of(model, input_ids)[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, next_token], dim=1)
    return input_ids


def greedy_margin(model, input_ids):
    """Return the smallest lead of the best token over the second one after the prompt."""
    best = logits_of(model, input_ids)[:, PROMPT_TOKENS - 1 : -1].topk(2).values
    return (best[..., 0] - best[..., 1]).min().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_cached_decoding_equals_the_whole_forward(name, seed):
    model = testing.build(name, seed)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    sequence = generate(model, prompt(seed), 4)
    assert sequence.shape == (1, PROMPT_TOKENS + 4)
    assert greedy_margin(model, sequence) > 1e-4
    whole = logits_of(model, sequence[:, :-1])[:, PROMPT_TOKENS - 1 :].argmax(-1)
    assert torch.equal(whole, sequence[:, PROMPT_TOKENS:])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "plain"])
def test_eager_attention_gives_the_same_logits(name):
    sdpa = logits_of(testing.build(name, 1), prompt())
    eager = logits_of(testing.build(name, 1, attn_implementation="eager"), prompt())
    torch.testing.assert_close(sdpa, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_shape_follow_the_seed(name):
    first = testing.build(name, 5).state_dict()
    torch.manual_seed(1234)
    second = testing.build(name, 5).state_dict()
    other = testing.build(name, 6).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(key not in other or not tensors_match(first[key], other[key]) for key in first)


def tensors_match(a, b):
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_global_random_state_is_untouched(name):
    before = torch.get_rng_state()
    testing.build(name, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_vary_what_a_rewrite_may_get_wrong():
    shapes = [zoo._draw_shape(seed) for seed in range(1, 13)]
    groups = {(shape.num_heads, shape.num_groups) for shape in shapes}
    assert {(3, 1), (6, 3), (5, 5), (7, 1)} <= groups
    assert {shape.num_layers for shape in shapes} == {2, 3}
    assert {shape.is_tied for shape in shapes} == {True, False}
    assert {shape.has_bias for shape in shapes} == {True, False}
    assert all(shape.hidden_size != shape.num_heads * shape.head_dim for shape in shapes)
    kinds = {zoo._llama(zoo._draw_shape(s))["rope_parameters"]["rope_type"] for s in range(8)}
    assert kinds == {"default", "linear", "llama3"}
    windows = {zoo._gemma3(zoo._draw_shape(s))["sliding_window"] for s in range(8)}
    assert {16, 96} <= windows


@pytest.mark.parametrize("seed", range(8))
def test_gemma3_mixes_sliding_and_full_layers(seed):
    kinds = testing.build("gemma3", seed).config.layer_types
    assert set(kinds) == {"sliding_attention", "full_attention"}


def test_tied_embeddings_are_one_tensor():
    model = next(
        model
        for model in (testing.build("llama", seed) for seed in range(1, 9))
        if model.config.tie_word_embeddings
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_unknown_name_is_an_error():
    with pytest.raises(KeyError):
        testing.build("elephant")


def test_tiny_llama_has_the_promised_shape_and_takes_overrides():
    config = testing.tiny_llama().config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (2, 64, 256)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.head_dim == 16
    assert testing.tiny_llama(num_hidden_layers=3).config.num_hidden_layers == 3
    flat = testing.tiny_llama(initializer_range=0.01, seed=2)
    assert flat.lm_head.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_tiny_llama_decodes_lively():
    model = testing.tiny_llama()
    sequence = generate(model, prompt(), 100)
    assert len(set(sequence[0, PROMPT_TOKENS:].tolist())) > 40
    best = logits_of(model, sequence)[:, PROMPT_TOKENS - 1 : -1].topk(2).values
    margins = best[..., 0] - best[..., 1]
    assert (margins > 1e-3).float().mean() > 0.9


def test_tiny_llama_attention_is_neither_flat_nor_a_spike():
    model = testing.tiny_llama(attn_implementation="eager")
    with torch.no_grad():
        maps = model(prompt(num_tokens=400), output_attentions=True).attentions
    for weights in maps:
        entropy = -(weights[0, :, -1] * weights[0, :, -1].clamp_min(1e-20).log()).sum(-1)
        assert 3 < entropy.mean().exp().item() < 200
