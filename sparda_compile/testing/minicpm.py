"""A MiniCPM-4-style causal LM for tests: scaled embeddings, residuals and head, LongRoPE, GQA.

The published model ships its code beside its weights, so a test cannot build it from an installed
library. This one follows the same equations, reads a transformers `Cache` through `update`, and
works with `generate`. Importing this module imports transformers.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["MiniCPMConfig", "MiniCPMForCausalLM"]

# transformers renamed it in 5.24.
_CACHE = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)


class MiniCPMConfig(PretrainedConfig):
    """Shape and scales of the model.

    Attributes:
        scale_emb: Factor of the token embeddings.
        scale_depth: Each residual branch is multiplied by `scale_depth / sqrt(num_layers)`.
        dim_model_base: The head reads hidden states divided by `hidden_size / dim_model_base`.
        original_max_positions: Longest context that the base rotary rates were made for.
        short_factor: Divisors of the rotary rates up to that context; None is all ones.
        long_factor: Divisors of the rotary rates beyond it; None is all ones.
    """

    model_type = "minicpm"
    keys_to_ignore_at_inference = (_CACHE,)

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 64,
        intermediate_size: int = 128,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int = 16,
        max_position_embeddings: int = 4096,
        original_max_positions: int = 4096,
        rope_theta: float = 10000.0,
        short_factor: list[float] | None = None,
        long_factor: list[float] | None = None,
        scale_emb: float = 12.0,
        scale_depth: float = 1.4,
        dim_model_base: int = 32,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.2,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.original_max_positions = original_max_positions
        self.rope_theta = rope_theta
        self.short_factor = short_factor or [1.0] * (head_dim // 2)
        self.long_factor = long_factor or [1.0] * (head_dim // 2)
        self.scale_emb = scale_emb
        self.scale_depth = scale_depth
        self.dim_model_base = dim_model_base
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class MiniCPMRMSNorm(nn.Module):
    """Root-mean-square norm with a weight, in fp32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the normalised states [B, T, C] in the dtype of the input."""
        wide = x_BTC.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x_BTC.dtype)


class MiniCPMLongRoPE(nn.Module):
    """Cosine and sine tables, stretched once when built and gathered by position."""

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        ratio = config.max_position_embeddings / config.original_max_positions
        factor = config.long_factor if ratio > 1 else config.short_factor
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        rates = 1.0 / (torch.tensor(factor) * config.rope_theta**exponent)
        steps = torch.arange(config.max_position_embeddings, dtype=torch.float32)
        angles = torch.outer(steps, rates).repeat(1, 2)
        growth = 1.0
        if ratio > 1:
            growth = math.sqrt(1 + math.log(ratio) / math.log(config.original_max_positions))
        self.register_buffer("cos_MD", angles.cos() * growth)
        self.register_buffer("sin_MD", angles.sin() * growth)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fp32 cosine and sine [B, 1, T, D] of positions [B, T]."""
        cos_BTD = self.get_buffer("cos_MD")[position_ids].float()
        sin_BTD = self.get_buffer("sin_MD")[position_ids].float()
        return cos_BTD.unsqueeze(1), sin_BTD.unsqueeze(1)


class MiniCPMAttention(nn.Module):
    """Grouped-query attention through the attention function that the config names."""

    def __init__(self, config: MiniCPMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(
        self,
        x_BTC: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend the new tokens [B, T, C] to all tokens of the cache and return [B, T, C]."""
        heads = (*x_BTC.shape[:-1], -1, self.head_dim)
        query = _rotate(self.q_proj(x_BTC).view(heads).transpose(1, 2), *rotary)
        key = _rotate(self.k_proj(x_BTC).view(heads).transpose(1, 2), *rotary)
        value = self.v_proj(x_BTC).view(heads).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, _eager_attention
        )
        out_BTHD, _ = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        out: Tensor = self.o_proj(out_BTHD.reshape(*x_BTC.shape[:-1], -1))
        return out


class MiniCPMMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the branch output [B, T, C]."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))
        return out


class MiniCPMDecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual with the depth scale."""

    def __init__(self, config: MiniCPMConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual_scale = config.scale_depth / math.sqrt(config.num_hidden_layers)
        self.input_layernorm = MiniCPMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MiniCPMAttention(config, layer_idx)
        self.post_attention_layernorm = MiniCPMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MiniCPMMLP(config)

    def forward(self, x_BTC: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states [B, T, C]; other arguments go to the attention."""
        branch = self.self_attn(self.input_layernorm(x_BTC), *args, **kwargs)
        x_BTC = x_BTC + branch * self.residual_scale
        out: Tensor = x_BTC + self.mlp(self.post_attention_layernorm(x_BTC)) * self.residual_scale
        return out


class MiniCPMPreTrainedModel(PreTrainedModel):
    """What transformers asks of a family: its config class and the attention it supports."""

    config_class = MiniCPMConfig
    base_model_prefix = "model"
    _no_split_modules = ["MiniCPMDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = [_CACHE]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class MiniCPMModel(MiniCPMPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = MiniCPMLongRoPE(config)
        self.layers = nn.ModuleList(
            MiniCPMDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = MiniCPMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        inputs_embeds: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the normalised hidden states [B, T, C] of the new tokens."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        x_BTC = inputs_embeds * self.config.scale_emb
        if position_ids is None:
            num_seen = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(x_BTC.shape[1], device=x_BTC.device).unsqueeze(0)
            position_ids = position_ids + num_seen
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BTC,
            attention_mask=attention_mask,
            **{_CACHE: cache},
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(position_ids)
        for layer in self.layers:
            x_BTC = layer(x_BTC, rotary, mask, cache, **kwargs)
        out: Tensor = self.norm(x_BTC)
        return out


class MiniCPMForCausalLM(MiniCPMPreTrainedModel, GenerationMixin):
    """The decoder and its untied, width-scaled head."""

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__(config)
        self.model = MiniCPMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head_divisor = config.hidden_size / config.dim_model_base
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Score the next token; the arguments are those of every causal LM of transformers."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = kwargs.pop(_CACHE, None)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        x_BTC = self.model(input_ids, attention_mask, position_ids, cache, inputs_embeds, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(x_BTC[:, kept] / self.head_divisor)
        output = CausalLMOutputWithPast(logits=logits_BTV, **{_CACHE: cache if use_cache else None})
        result: tuple[Any, ...] = output.to_tuple()
        return result if return_dict is False else output


def _rotate(x_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor) -> Tensor:
    wide = x_BHTD.float()
    first, second = wide.chunk(2, dim=-1)
    turned = wide * cos_B1TD + torch.cat((-second, first), dim=-1) * sin_B1TD
    return turned.to(x_BHTD.dtype)


def _eager_attention(
    module: MiniCPMAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores_BHTS = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    weights_BHTS = functional.softmax(scores_BHTS, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights_BHTS, value).transpose(1, 2).contiguous(), weights_BHTS
