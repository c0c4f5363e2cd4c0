"""Models that must be refused: attention that block selection would compute wrongly.

The hand-written ones differ from `PlainCausalLM` in one point each.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparda_compile.testing.building import AttnImplementation, build_from_transformers
from sparda_compile.testing.plain import PlainAttention, PlainCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "UNSUPPORTED_MODELS",
    "AlibiLM",
    "BidirectionalLM",
    "InterleavedLM",
    "NoPositionLM",
    "PrefixLM",
]

_PREFIX_TOKENS: Final = 8

_COMMON: Final[Mapping[str, Any]] = {
    "vocab_size": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "hidden_size": 64,
}
_GROUPED: Final[Mapping[str, Any]] = {
    **_COMMON,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


class BidirectionalAttention(PlainAttention):
    """Attention without a mask: every token sees those after it."""

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        """Return the attention output [B, H, T, D]."""
        return functional.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, enable_gqa=True)


class AlibiAttention(PlainAttention):
    """Causal attention with a float bias that falls with distance, one slope per head."""

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        """Return the attention output [B, H, T, D]."""
        steps = torch.arange(q_BHTD.shape[2], device=q_BHTD.device)
        distance_TT = steps[:, None] - steps[None, :]
        slopes_H = 2.0 ** -torch.arange(1, self.num_heads + 1, device=q_BHTD.device)
        bias_HTT = -slopes_H[:, None, None] * distance_TT
        bias_HTT = bias_HTT.masked_fill(distance_TT < 0, float("-inf"))
        return functional.scaled_dot_product_attention(
            q_BHTD, k_BGTD, v_BGTD, attn_mask=bias_HTT, enable_gqa=True
        )


class InterleavedAttention(PlainAttention):
    """Causal attention whose query head h reads KV head h mod G, not h // (H / G)."""

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        """Return the attention output [B, H, T, D]."""
        repeats = self.num_heads // self.num_groups
        return functional.scaled_dot_product_attention(
            q_BHTD,
            k_BGTD.repeat(1, repeats, 1, 1),
            v_BGTD.repeat(1, repeats, 1, 1),
            is_causal=True,
        )


class PrefixAttention(PlainAttention):
    """Attention that is causal, except that every token sees the first eight."""

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        """Return the attention output [B, H, T, D]."""
        steps = torch.arange(q_BHTD.shape[2], device=q_BHTD.device)
        mask_TT = (steps[None, :] <= steps[:, None]) | (steps[None, :] < _PREFIX_TOKENS)
        return functional.scaled_dot_product_attention(
            q_BHTD, k_BGTD, v_BGTD, attn_mask=mask_TT, enable_gqa=True
        )


class BidirectionalLM(PlainCausalLM):
    """An encoder in the shape of a causal LM."""

    attention_class = BidirectionalAttention


class AlibiLM(PlainCausalLM):
    """Scores depend on the distance, which pooled keys do not know."""

    attention_class = AlibiAttention


class InterleavedLM(PlainCausalLM):
    """Groups are not runs of neighbouring heads."""

    attention_class = InterleavedAttention


class PrefixLM(PlainCausalLM):
    """Prompt tokens read ahead of themselves."""

    attention_class = PrefixAttention


class NoPositionLM(PlainCausalLM):
    """Its forward takes tokens alone, so one token cannot be placed at its position."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        """Return logits [B, T, V] of tokens [B, T] that start at position 0."""
        return super().forward(input_ids)


def _refused(
    prefix: str,
    fields: Mapping[str, Any],
    model_suffix: str = "ForCausalLM",
    attn: AttnImplementation = "sdpa",
) -> Callable[[], nn.Module]:
    return functools.partial(
        build_from_transformers,
        prefix + model_suffix,
        prefix + "Config",
        fields,
        seed=0,
        attn_implementation=attn,
    )


UNSUPPORTED_MODELS: Final[Mapping[str, tuple[Callable[[], nn.Module], str]]] = {
    "deepseek_v3": (
        _refused(
            "DeepseekV3",
            {
                **_GROUPED,
                "num_key_value_heads": 4,
                "kv_lora_rank": 32,
                "q_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "first_k_dense_replace": 2,
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 64,
            },
        ),
        "DeepseekV3",
    ),
    "gpt_oss": (
        _refused(
            "GptOss",
            {**_GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
            attn="eager",
        ),
        "GptOss",
    ),
    "bloom": (
        _refused("Bloom", {**_COMMON, "n_layer": 2, "n_head": 4}, attn="eager"),
        "Bloom",
    ),
    "qwen3_next": (
        _refused(
            "Qwen3Next",
            {
                **_GROUPED,
                "head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 64,
                "shared_expert_intermediate_size": 64,
                "layer_types": ["linear_attention", "full_attention"],
            },
        ),
        "Qwen3Next",
    ),
    "mamba": (
        _refused("Mamba", {**_COMMON, "num_hidden_layers": 2, "state_size": 8}, attn="eager"),
        "Mamba",
    ),
    "lfm2": (
        _refused("Lfm2", {**_GROUPED, "layer_types": ["conv", "full_attention"]}),
        "Lfm2",
    ),
    "t5": (
        _refused(
            "T5",
            {
                "vocab_size": 256,
                "pad_token_id": 0,
                "decoder_start_token_id": 0,
                "d_model": 64,
                "d_kv": 16,
                "d_ff": 128,
                "num_heads": 4,
                "num_layers": 2,
            },
            model_suffix="ForConditionalGeneration",
            attn="eager",
        ),
        "T5",
    ),
    "bart": (
        _refused(
            "Bart",
            {
                "vocab_size": 256,
                "d_model": 64,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 128,
                "decoder_ffn_dim": 128,
                "forced_eos_token_id": None,
            },
            model_suffix="ForConditionalGeneration",
        ),
        "Bart",
    ),
    "bidirectional": (BidirectionalLM, "Bidirectional"),
    "alibi_bias": (AlibiLM, "Alibi"),
    "interleaved_groups": (InterleavedLM, "Interleaved"),
    "no_position_ids": (NoPositionLM, "position_ids"),
    "prefix_lm": (PrefixLM, "Prefix"),
}
"""Name -> builder, and a word that the refusal must contain.

The word is the part that the names of the model class and of its attention class share.
"""
