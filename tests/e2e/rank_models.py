"""The checkpoints of `rank_cases.py`, and a Forecast for each."""

from __future__ import annotations

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparda_compile.forecast.projection import Projection
from sparda_compile.forecast.weights import ForecastWeights

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def make_models(folder):
    """Write the checkpoints of the families, and a Forecast for each."""
    torch.manual_seed(0)
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "odd": LlamaForCausalLM(
            LlamaConfig(**{**SHAPE, "num_attention_heads": 12, "num_key_value_heads": 6,
                           "hidden_size": 96})
        ),
        "few": LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_key_value_heads": 2})),
        "olmo2": Olmo2ForCausalLM(Olmo2Config(**{**SHAPE, "num_key_value_heads": 1})),
        "mixtral": MixtralForCausalLM(
            MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)
        ),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    }  # fmt: skip
    for name, model in made.items():
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2) if weight.dim() > 1 else None
        model.save_pretrained(folder / name)
        dim = model.config.hidden_size // model.config.num_attention_heads
        dim = getattr(model.config, "head_dim", None) or dim
        rows = model.config.num_key_value_heads * dim
        forecast = {
            i: Projection((torch.randn(rows, model.config.hidden_size) * 0.2,)) for i in range(2)
        }
        ForecastWeights(forecast).save(folder / f"{name}.safetensors")
