"""A NOSA-style causal LM for tests: Llama whose tokens have a retention score in each KV head.

    c[t, g] = A_g * softplus((Delta v_t)_g)            v_t: the values of all KV heads of token t
    weight of token t  ~  exp(q . k_t * scale) * exp(c[t, g])

The published model ships its code beside its weights. This one follows the same equations and puts
them into plain attention: a key gets the channel c / scale behind zeros that fill its width up to a
multiple of 16, a query gets 1 there, and a value gets zeros that the output drops again. So the KV
cache holds c, and selector `nosa` finds it in the last channel. Source: NOSA as SparDA (arXiv
2606.04511) takes it. Importing this module imports transformers.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

__all__ = ["NosaAttention", "NosaConfig", "NosaForCausalLM"]

_MULTIPLE: Final = 16


class NosaConfig(LlamaConfig):
    """Llama's shape; retention adds no size of its own."""

    model_type = "nosa"


class NosaAttention(LlamaAttention):
    """Llama's attention with retention scores: `delta` and `amplitude`, one row per KV head."""

    def __init__(self, config: NosaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        groups = config.num_key_value_heads or config.num_attention_heads
        self.delta = nn.Linear(groups * self.head_dim, groups, bias=False)
        self.amplitude = nn.Parameter(torch.ones(groups))
        self.num_extra = _MULTIPLE - self.head_dim % _MULTIPLE

    def retention(self, v_BGTD: Tensor) -> Tensor:
        """Return the retention score of each token, [B, G, T], from the values of all KV heads."""
        raised_BTG = functional.softplus(self.delta(v_BGTD.transpose(1, 2).flatten(2)))
        scores_BTG: Tensor = self.amplitude * raised_BTG
        return scores_BTG.transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attend the new tokens [B, T, C] to all tokens of the cache and return [B, T, C]."""
        assert position_embeddings is not None
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(heads).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        query, key, value = self._carry(query, key, value)
        # transformers renamed it in 5.24.
        cache = kwargs.pop("cache", kwargs.pop("past_key_values", None))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out_BTHD, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        out_BTC = out_BTHD[..., : self.head_dim].reshape(*hidden_states.shape[:-1], -1)
        return self.o_proj(out_BTC), weights

    def _carry(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Widen the heads: 1 and c / scale in the last channel, zeros in all other new ones."""
        zeros = (0, self.num_extra - 1)
        channel_BGT1 = (self.retention(value) / self.scaling)[..., None]
        return (
            # No shape is named, so the same nodes take a Forecast, which has fewer heads.
            functional.pad(functional.pad(query, zeros), (0, 1), value=1.0),
            torch.cat([functional.pad(key, zeros), channel_BGT1.to(key.dtype)], dim=-1),
            functional.pad(value, (0, self.num_extra)),
        )


class NosaForCausalLM(LlamaForCausalLM):
    """Llama with retention scores in every layer."""

    config_class = NosaConfig

    def __init__(self, config: NosaConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.self_attn = NosaAttention(config, number)
        self.post_init()  # type: ignore[no-untyped-call]
