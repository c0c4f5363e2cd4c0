"""Models to measure: real shapes, random weights made on the device."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from torch import nn

__all__ = ["SHAPES", "ModelShape", "build_model"]


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A Llama-like model's sizes.

    Attributes:
        num_layers: Decoder layers.
        hidden: Width of the residual stream.
        ffn: Width of the feed-forward network.
        num_heads: Query heads.
        num_groups: KV heads.
        head_dim: D.
        vocabulary: Tokens.
    """

    num_layers: int = 32
    hidden: int = 4096
    ffn: int = 16384
    num_heads: int = 32
    num_groups: int = 2
    head_dim: int = 128
    vocabulary: int = 73448


# 8b is MiniCPM4.1-8B's shape (SparDA, arXiv 2606.04511); 8b-8kv has Llama's eight KV heads.
SHAPES: Final = {
    "8b": ModelShape(),
    "8b-8kv": ModelShape(num_groups=8),
    "tiny": ModelShape(2, 64, 128, 4, 2, 16, 256),
}


def build_model(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a Llama of that shape with random weights, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_groups,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=1 << 20,
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    module: nn.Module = model.eval()
    return module
