from __future__ import annotations

import math

import pytest
import torch

from sparda_compile.testing import build
from sparda_compile.testing.minicpm import MiniCPMConfig, MiniCPMForCausalLM, MiniCPMLongRoPE


def prompt(batch, num_tokens):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, num_tokens), generator=generator)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_cached_generate_equals_the_whole_forward(attn_implementation):
    model = build("minicpm4", attn_implementation=attn_implementation)
    sequence = model.generate(prompt(2, 50), max_new_tokens=30, do_sample=False)
    whole = model(sequence[:, :-1], use_cache=False)
    assert whole.past_key_values is None
    assert torch.equal(whole.logits[:, 49:].argmax(-1), sequence[:, 50:])


@torch.no_grad()
def test_left_padding_does_not_change_a_row():
    model = build("minicpm4")
    ids = prompt(1, 20)
    padded = torch.cat([torch.zeros(1, 12, dtype=torch.int64), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :12] = 0
    alone = model.generate(ids, max_new_tokens=12, do_sample=False)[:, 20:]
    beside = model.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(beside[:, 32:], alone)


@torch.no_grad()
def test_logits_to_keep_and_tuples():
    model = build("minicpm4")
    ids = prompt(1, 9)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(ids, return_dict=False)[0], logits)
    embedded = model(inputs_embeds=model.model.embed_tokens(ids)).logits
    torch.testing.assert_close(embedded, logits)


def test_long_rope_stretches_once_and_by_the_maximum():
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    short = MiniCPMLongRoPE(MiniCPMConfig(original_max_positions=4096, **factors))
    long = MiniCPMLongRoPE(MiniCPMConfig(original_max_positions=1024, **factors))
    growth = math.sqrt(1 + math.log(4) / math.log(1024))
    assert short.cos_MD[0].tolist() == pytest.approx([1.0] * 16)
    assert long.cos_MD[0].tolist() == pytest.approx([growth] * 16)
    torch.testing.assert_close(long.cos_MD[400], short.cos_MD[100] * growth)
    torch.testing.assert_close(long.sin_MD[400], short.sin_MD[100] * growth)
    cos_B1TD, _ = long(torch.tensor([[3, 7], [0, 9]]))
    assert cos_B1TD.shape == (2, 1, 2, 16)
    torch.testing.assert_close(cos_B1TD[1, 0, 1], long.cos_MD[9])


@torch.no_grad()
def test_scales_are_those_of_the_family():
    config = MiniCPMConfig()
    model = MiniCPMForCausalLM(config).eval()
    seen = {}
    model.model.layers[0].register_forward_hook(
        lambda layer, args, output: seen.update(x=args[0], out=output)
    )
    model.lm_head.register_forward_hook(lambda head, args, output: seen.update(head=args[0]))
    model.model.norm.register_forward_hook(lambda norm, args, output: seen.update(norm=output))
    model.model.layers[0].mlp.register_forward_hook(
        lambda mlp, args, output: seen.update(mlp=output)
    )
    model.model.layers[0].self_attn.register_forward_hook(
        lambda attention, args, output: seen.update(attention=output)
    )
    ids = prompt(1, 5)
    model(ids)
    torch.testing.assert_close(seen["x"], model.model.embed_tokens(ids) * 12)
    branches = (seen["attention"] + seen["mlp"]) * (1.4 / math.sqrt(2))
    torch.testing.assert_close(seen["out"], seen["x"] + branches)
    torch.testing.assert_close(seen["head"], seen["norm"] / (64 / 32))
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@torch.no_grad()
def test_it_can_be_saved_and_loaded(tmp_path):
    model = build("minicpm4", 1)
    model.save_pretrained(tmp_path)
    loaded = MiniCPMForCausalLM.from_pretrained(tmp_path).eval()
    ids = prompt(1, 9)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_half_precision_rotates_in_single():
    model = build("minicpm4").to(torch.bfloat16)
    logits = model(prompt(1, 9)).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
