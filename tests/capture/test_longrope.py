"""LongRoPE switches where the original switches, in every kind of call, and leaves it as it was."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.capture.longrope import choosing_by_positions
from sparda_compile.errors import CaptureError
from sparda_compile.testing import tiny_llama
from sparda_compile.testing.building import build_from_transformers

LIMIT = 64
ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "factor": 4.0,
    "long_factor": [4.0 + i for i in range(8)], "original_max_position_embeddings": LIMIT,
}  # fmt: skip
CONFIG = SpardaConfig(mode="query", top_k=None, lowering="eager", block_size=16)
SHAPE = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def llama():
    return tiny_llama(num_hidden_layers=2, rope_parameters=ROPE, max_position_embeddings=256)


def phi3():
    rope = ROPE | {"partial_rotary_factor": 1.0}
    more = {"rope_parameters": rope, "original_max_position_embeddings": LIMIT}
    return build_from_transformers(
        "Phi3ForCausalLM", "Phi3Config", SHAPE | more | {"sliding_window": None},
        seed=0, attn_implementation="sdpa",
    )  # fmt: skip


@pytest.fixture(scope="module", params=[llama, phi3])
def pair(request):
    model = request.param()
    return model, optimize(model, CONFIG)


def prompt(num_tokens, batch_size):
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(1, 256, (batch_size, num_tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("length", [10, 55, LIMIT - 1, LIMIT, LIMIT + 1, 90])
def test_generates_what_the_model_does(pair, length, batch_size):
    model, fast = pair
    asked = prompt(length, batch_size) | {"max_new_tokens": 15, "do_sample": False}
    want = model.generate(**asked)
    assert torch.equal(fast.generate(**asked), want)
    assert len(set(want[0, length:].tolist())) > 1


def test_the_two_sets_of_frequencies_give_other_logits():
    """The switch is seen: a model that never switches has other logits beyond it, and not below."""
    never = ROPE | {"original_max_position_embeddings": 256}
    never = tiny_llama(num_hidden_layers=2, rope_parameters=never, max_position_embeddings=256)
    fast = optimize(llama(), CONFIG)
    for length, same in ((LIMIT, True), (LIMIT + 1, False)):
        asked = prompt(length, 1)
        factor = [model.model.rotary_emb.attention_scaling for model in (never, fast)]
        with torch.no_grad():
            want = never(**asked).logits
        if factor[0] == factor[1]:
            assert torch.allclose(fast(**asked).logits, want, atol=1e-4) is same


def test_the_model_is_left_as_it_was():
    model = llama()
    before = {name: value.clone() for name, value in model.named_buffers()}
    rotary = model.model.rotary_emb
    with choosing_by_positions(model):
        assert "forward" in vars(rotary)
    assert "forward" not in vars(rotary)
    optimize(model, CONFIG)(**prompt(90, 1))
    assert "forward" not in vars(rotary)
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_other_rotations_are_not_touched():
    model = tiny_llama()
    with choosing_by_positions(model):
        assert not any("forward" in vars(module) for module in model.modules())


def test_dynamic_ntk_is_refused_with_its_reason():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_llama(num_hidden_layers=1, rope_parameters=rope, max_position_embeddings=64)
    with pytest.raises(CaptureError, match="rotary_emb has the rope_type 'dynamic'"):
        optimize(model, CONFIG)
