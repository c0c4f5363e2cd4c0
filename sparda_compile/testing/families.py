"""Tiny random models of further families of transformers, each with forms that its config allows.

`zoo.py` varies the families that every mode is tested on. These have one shape, and named forms:
what a config can switch (parallel residuals, biases, norms, windows, partial rotation, caps) is
where a family leaves the common path.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.testing.building import AttnImplementation, build_from_transformers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["FAMILIES", "Family", "build_form"]

_SHAPE: Final[dict[str, Any]] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED: Final = {**_SHAPE, "num_key_value_heads": 2}
_WIDE: Final = {**_GROUPED, "head_dim": 24}
_SLIDING_FIRST: Final = {
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"],
}
_OLD_NAMES: Final = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def _old(**fields: Any) -> dict[str, Any]:
    """Return the shape under the names of GPT-J and its like."""
    shape = {_OLD_NAMES.get(name, name): value for name, value in _SHAPE.items()}
    del shape["intermediate_size"], shape["pad_token_id"]
    return shape | fields


def _rotated(share: float) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": share,
        }
    }


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of transformers, and what its config can switch.

    Attributes:
        prefix: What the names of its classes begin with.
        brings: What it has that the plainest family has not.
        fields: Fields of the plain form's config.
        forms: Name of a form -> the fields in which its config differs.
        attentions: Attention implementations that it has.
    """

    prefix: str
    brings: str
    fields: Mapping[str, Any]
    forms: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    attentions: tuple[AttnImplementation, ...] = ("sdpa", "eager")


FAMILIES: Final[Mapping[str, Family]] = {
    "gpt_neox": Family(
        "GPTNeoX",
        "parallel residual, fused projection by heads, partial RoPE, biases",
        _SHAPE | _rotated(0.25),
        {
            "serial": {"use_parallel_residual": False},
            "no_bias_tied": {"attention_bias": False, "tie_word_embeddings": True},
            "one_layer": {"num_hidden_layers": 1},
        },
    ),
    "falcon": Family(
        "Falcon",
        "parallel residual, fused projection that multiplies by a transposed weight, one KV head",
        {name: size for name, size in _SHAPE.items() if name != "intermediate_size"},
        {
            "all_heads": {"multi_query": False},
            "new": {"new_decoder_architecture": True, "num_kv_heads": 2},
            "serial_bias": {"parallel_attn": False, "bias": True},
        },
    ),
    "gptj": Family(
        "GPTJ",
        "parallel residual, interleaved partial RoPE",
        _old(rotary_dim=8),
        {"full_rotary": {"rotary_dim": 16}},
    ),
    "codegen": Family(
        "CodeGen",
        "parallel residual, fused projection in four shards, interleaved partial RoPE",
        _old(rotary_dim=8),
        {"one_layer": {"n_layer": 1}},
    ),
    "opt": Family(
        "OPT",
        "learned positions behind an offset, biases",
        {**_SHAPE, "ffn_dim": 128},
        {
            "post_norm": {"do_layer_norm_before": False},
            "narrow_embedding": {"word_embed_proj_dim": 32},
            "no_bias": {"enable_bias": False, "layer_norm_elementwise_affine": False},
        },
    ),
    "phi": Family(
        "Phi",
        "parallel residual, partial RoPE, biases",
        _GROUPED | _rotated(0.5),
        {"qk_norm": {"qk_layernorm": True}, "one_layer": {"num_hidden_layers": 1}},
    ),
    "starcoder2": Family(
        "Starcoder2",
        "biases, a window on every layer where the config sets one",
        _GROUPED,
        {"window": {"sliding_window": 24}, "no_bias": {"use_bias": False}},
    ),
    "stablelm": Family(
        "StableLm",
        "partial RoPE, LayerNorm; optional parallel residual and norms per head",
        _GROUPED | _rotated(0.25),
        {
            "parallel": {"use_parallel_residual": True},
            "qk_norm": {"qk_layernorm": True},
            "bias": {"use_qkv_bias": True},
        },
    ),
    "cohere": Family(
        "Cohere",
        "parallel residual, interleaved RoPE, scaled logits",
        {**_GROUPED, "logit_scale": 0.25},
        {"qk_norm": {"use_qk_norm": True}, "bias": {"attention_bias": True}},
    ),
    "cohere2": Family(
        "Cohere2",
        "sliding layers with RoPE beside full ones without positions",
        {**_GROUPED, "head_dim": 16, **_SLIDING_FIRST, "logit_scale": 0.25},
        {"wider": {"sliding_window": 48}, "full": {"layer_types": ["full_attention"] * 2}},
    ),
    "olmo": Family(
        "Olmo",
        "norms without weights; optional clamp of query, key and value",
        _GROUPED,
        {"clip": {"clip_qkv": 1.0}, "bias": {"attention_bias": True}},
    ),
    "olmo2": Family(
        "Olmo2",
        "norms over all queries and all keys, norms after the branches",
        _GROUPED,
        {"bias": {"attention_bias": True}},
    ),
    "olmo3": Family(
        "Olmo3",
        "sliding and full layers, norms over all queries and all keys",
        {**_GROUPED, **_SLIDING_FIRST},
        {"wider": {"sliding_window": 48}},
    ),
    "smollm3": Family(
        "SmolLM3",
        "layers without positions beside layers with RoPE",
        {**_GROUPED, "no_rope_layers": [1, 0]},
        {
            "window": {"use_sliding_window": True, "sliding_window": 24},
            "no_rope": {"no_rope_layers": [0, 0]},
            "bias": {"attention_bias": True, "mlp_bias": True},
        },
    ),
    "exaone4": Family(
        "Exaone4",
        "sliding layers with RoPE beside full ones without, norms on queries and keys",
        {**_GROUPED, **_SLIDING_FIRST},
        {"full": {"sliding_window": None, "layer_types": ["full_attention"] * 2}},
    ),
    "granite": Family(
        "Granite",
        "scaled embeddings, residuals, scores and logits",
        {
            **_GROUPED,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        {"bias": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}},
    ),
    "granitemoe": Family(
        "GraniteMoe",
        "mixture of experts, scaled as Granite",
        {
            **_GROUPED,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "num_local_experts": 4,
        },
        {"bias": {"attention_bias": True}},
    ),
    "persimmon": Family(
        "Persimmon",
        "fused projection by heads, norms on queries and keys, partial RoPE",
        _SHAPE | _rotated(0.5),
        {"no_norm": {"qk_layernorm": False}},
    ),
    "nemotron": Family(
        "Nemotron",
        "norms of 1 + weight, squared ReLU, partial RoPE",
        _WIDE | _rotated(0.5),
        {"bias": {"attention_bias": True, "mlp_bias": True}},
    ),
    "ernie4_5": Family(
        "Ernie4_5",
        "interleaved RoPE",
        _WIDE,
        {"bias": {"use_bias": True}},
    ),
    "hunyuan": Family(
        "HunYuanDenseV1",
        "norms on queries and keys behind RoPE",
        _WIDE,
        {
            "bias": {"attention_bias": True},
            "dynamic": {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 10000.0,
                    "alpha": 1000.0,
                    "factor": 1.0,
                }
            },
        },
    ),
    "arcee": Family(
        "Arcee",
        "squared ReLU without a gate",
        {**_GROUPED, "head_dim": 16},
        {
            "yarn": {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 1024,
                }
            }
        },
    ),
    "helium": Family(
        "Helium",
        "interleaved RoPE, no bias on the output",
        {**_GROUPED, "head_dim": 16},
        {"bias": {"attention_bias": True}},
    ),
    "seed_oss": Family(
        "SeedOss",
        "biases on query, key and value, wide heads",
        _WIDE,
        {"out_bias": {"attention_out_bias": True, "mlp_bias": True}},
    ),
    "qwen2_moe": Family(
        "Qwen2Moe",
        "mixture of experts with a shared one, biases",
        {
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
        {
            "window": {
                "use_sliding_window": True,
                "sliding_window": 24,
                "max_window_layers": 1,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "no_bias": {"qkv_bias": False},
        },
    ),
    "apertus": Family(
        "Apertus",
        "norms on queries and keys, xIELU",
        _GROUPED,
        {"bias": {"attention_bias": True}},
    ),
    "dots1": Family(
        "Dots1",
        "dense and expert layers, norms on queries and keys, optional windows",
        {
            **_WIDE,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "layer_types": ["full_attention", "full_attention"],
        },
        {"window": _SLIDING_FIRST},
    ),
    "biogpt": Family(
        "BioGpt",
        "learned positions behind an offset, scaled embeddings",
        _SHAPE,
        {"unscaled": {"scale_embedding": False}},
    ),
    "afmoe": Family(
        "Afmoe",
        "sliding layers with RoPE beside full ones without, gated attention, experts",
        {
            **_GROUPED,
            "head_dim": 16,
            **_SLIDING_FIRST,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
    ),
    "gemma": Family("Gemma", "norms of 1 + weight, scaled embeddings", _WIDE),
    "gemma2": Family(
        "Gemma2",
        "sliding and full layers, soft caps on scores and logits",
        {**_WIDE, **_SLIDING_FIRST, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        {"no_cap": {"attn_logit_softcapping": None, "final_logit_softcapping": None}},
        attentions=("eager",),
    ),
}
"""Name of a family -> what it is."""


def build_form(
    name: str,
    form: str = "",
    *,
    seed: int = 0,
    attn_implementation: AttnImplementation = "sdpa",
) -> nn.Module:
    """Build a tiny model of a family: two layers, hidden 64, 4 heads, vocabulary 256.

    Args:
        name: A key of `FAMILIES`.
        form: A key of the family's `forms`, or empty for the plain form.
        seed: Seed of the weights.
        attn_implementation: `sdpa` or `eager`.

    Returns:
        The model in eval mode, in fp32, on the CPU. The global random state is as before.

    Raises:
        KeyError: If there is no such family, or it has no such form.
    """
    family = FAMILIES[name]
    changed = family.forms[form] if form else {}
    model: nn.Module = build_from_transformers(
        f"{family.prefix}ForCausalLM",
        f"{family.prefix}Config",
        {**family.fields, **changed},
        seed=seed,
        attn_implementation=attn_implementation,
    )
    return model
