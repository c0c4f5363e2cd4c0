"""Tiny random models of every supported family, by name and seed; nothing is downloaded."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any, Final, Protocol

from sparda_compile.testing.building import (
    AttnImplementation,
    build_from_config,
    build_from_transformers,
)
from sparda_compile.testing.plain import PlainCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from transformers import LlamaForCausalLM

    from sparda_compile.testing.nosa import NosaForCausalLM

__all__ = ["TINY_MODELS", "ModelBuilder", "build", "tiny_llama", "tiny_nosa"]

_MAX_POSITIONS: Final = 4096
_HEAD_COUNTS: Final = ((4, 2), (3, 1), (6, 3), (5, 5), (7, 1), (8, 2))
_HEAD_DIMS: Final = (16, 20, 24, 32)
_THETAS: Final = (1000.0, 10000.0, 500000.0)
_NO_SPECIAL_TOKENS: Final[Mapping[str, None]] = {
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


class ModelBuilder(Protocol):
    """Makes the tiny model of one family: seed 0 is plain, other seeds draw a variation."""

    def __call__(
        self, seed: int = 0, *, attn_implementation: AttnImplementation = "sdpa"
    ) -> nn.Module:
        """Return the model in eval mode, in fp32, on the CPU."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
    """What a seed chooses for any family; `draws` makes the choices of one family."""

    num_layers: int = 2
    num_heads: int = 4
    num_groups: int = 2
    head_dim: int = 16
    hidden_size: int = 64
    theta: float = 10000.0
    is_tied: bool = False
    has_bias: bool = False
    draws: random.Random | None = None

    @property
    def square_size(self) -> int:
        """Hidden size of a family whose heads divide it."""
        return self.num_heads * self.head_dim

    def choose(self, base: Any, *others: Any) -> Any:
        """Return `base` for seed 0 and any of the values for other seeds."""
        return base if self.draws is None else self.draws.choice((base, *others))

    def fields(self, *, is_square: bool = False) -> dict[str, Any]:
        """Return the choices under the field names that most configs share."""
        return {
            **_NO_SPECIAL_TOKENS,
            "vocab_size": 256,
            "hidden_size": self.square_size if is_square else self.hidden_size,
            "intermediate_size": 2 * self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_groups,
            "head_dim": self.head_dim,
            "max_position_embeddings": _MAX_POSITIONS,
            "tie_word_embeddings": self.is_tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
        }


def _draw_shape(seed: int) -> _Shape:
    if seed == 0:
        return _Shape()
    rng = random.Random(f"tiny model {seed}")  # neighbouring numbers would draw alike
    num_heads, num_groups = _HEAD_COUNTS[seed % len(_HEAD_COUNTS)]
    head_dim = rng.choice(_HEAD_DIMS)
    # Multiples of 8, which grouped matrix products of experts need in any dtype.
    widths = [width for width in range(48, 121, 8) if width % num_heads == 0]
    widths = [width for width in widths if width != num_heads * head_dim]
    return _Shape(
        num_layers=rng.choice((2, 3)),
        num_heads=num_heads,
        num_groups=num_groups,
        head_dim=head_dim,
        hidden_size=rng.choice(widths),
        theta=rng.choice(_THETAS),
        is_tied=rng.random() < 0.5,
        has_bias=rng.random() < 0.5,
        draws=rng,
    )


def _llama(shape: _Shape) -> dict[str, Any]:
    rope = shape.choose(
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    )
    return shape.fields() | {
        "attention_bias": shape.has_bias,
        "rope_parameters": rope | {"rope_theta": shape.theta},
    }


def _qwen2(shape: _Shape) -> dict[str, Any]:
    return shape.fields(is_square=True)


def _qwen3(shape: _Shape) -> dict[str, Any]:
    return shape.fields() | {"attention_bias": shape.has_bias}


def _mistral(shape: _Shape) -> dict[str, Any]:
    return shape.fields() | {"sliding_window": None}


def _mixtral(shape: _Shape) -> dict[str, Any]:
    return _mistral(shape) | {
        "num_local_experts": shape.choose(4, 3),
        "num_experts_per_tok": shape.choose(2, 1),
    }


def _qwen3_moe(shape: _Shape) -> dict[str, Any]:
    return _qwen3(shape) | {
        "num_experts": shape.choose(4, 3),
        "num_experts_per_tok": 2,
        "moe_intermediate_size": shape.hidden_size,
        "norm_topk_prob": shape.choose(True, False),
        "mlp_only_layers": shape.choose([], [0], [1]),
    }


def _phi3(shape: _Shape) -> dict[str, Any]:
    fields = shape.fields(is_square=True)
    fields["rope_parameters"]["partial_rotary_factor"] = shape.choose(1.0, 0.5)
    return fields | {"original_max_position_embeddings": _MAX_POSITIONS}


def _gemma3(shape: _Shape) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention", "full_attention"][: shape.num_layers]
    if shape.draws is not None:
        shape.draws.shuffle(kinds)
    return shape.fields() | {
        "attention_bias": shape.has_bias,
        "layer_types": kinds,
        "query_pre_attn_scalar": shape.choose(shape.head_dim, 12),
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": shape.theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "sliding_window": shape.choose(16, 48, 96),
    }


def _glm4(shape: _Shape) -> dict[str, Any]:
    fields = shape.fields()
    fields["rope_parameters"]["partial_rotary_factor"] = 0.5
    return fields | {"attention_bias": shape.has_bias}


def _gpt2(shape: _Shape) -> dict[str, Any]:
    return {
        **_NO_SPECIAL_TOKENS,
        "vocab_size": 256,
        "n_embd": shape.square_size,
        "n_layer": shape.num_layers,
        "n_head": shape.num_heads,
        "n_positions": _MAX_POSITIONS,
        "tie_word_embeddings": shape.is_tied,
        "scale_attn_by_inverse_layer_idx": shape.choose(False, True),
    }


def _family(
    model_name: str, config_name: str, fields: Callable[[_Shape], dict[str, Any]]
) -> ModelBuilder:
    """Return the builder of a family of transformers."""

    def build_family(
        seed: int = 0, *, attn_implementation: AttnImplementation = "sdpa"
    ) -> nn.Module:
        model: nn.Module = build_from_transformers(
            model_name,
            config_name,
            fields(_draw_shape(seed)),
            seed=seed,
            attn_implementation=attn_implementation,
        )
        return model

    return build_family


def _build_minicpm4(
    seed: int = 0, *, attn_implementation: AttnImplementation = "sdpa"
) -> nn.Module:
    from sparda_compile.testing.minicpm import MiniCPMConfig, MiniCPMForCausalLM

    shape = _draw_shape(seed)
    num_rates = shape.head_dim // 2
    fields = shape.fields() | {
        "dim_model_base": shape.hidden_size // 2,
        "original_max_positions": shape.choose(512, _MAX_POSITIONS),
        "short_factor": [1.0 + 0.05 * i for i in range(num_rates)],
        "long_factor": [1.0 + 0.4 * i for i in range(num_rates)],
        "tie_word_embeddings": False,
    }
    rope = fields.pop("rope_parameters")
    config = MiniCPMConfig(**fields, rope_theta=rope["rope_theta"])
    model: nn.Module = build_from_config(
        MiniCPMForCausalLM, config, seed=seed, attn_implementation=attn_implementation
    )
    return model


def _build_plain(seed: int = 0, *, attn_implementation: AttnImplementation = "sdpa") -> nn.Module:
    """Build a `PlainCausalLM`; it always calls torch's attention, whatever is asked for."""
    shape = _draw_shape(seed)
    return PlainCausalLM(
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_groups=shape.num_groups,
        head_dim=shape.head_dim,
        max_positions=_MAX_POSITIONS,
        positions="learned" if seed % 4 >= 2 else "rotary",
        group_form="repeat_interleave" if seed % 2 else "enable_gqa",
        seed=seed,
    )


TINY_MODELS: Final[Mapping[str, ModelBuilder]] = {
    "llama": _family("LlamaForCausalLM", "LlamaConfig", _llama),
    "qwen2": _family("Qwen2ForCausalLM", "Qwen2Config", _qwen2),
    "qwen3": _family("Qwen3ForCausalLM", "Qwen3Config", _qwen3),
    "mistral": _family("MistralForCausalLM", "MistralConfig", _mistral),
    "mixtral": _family("MixtralForCausalLM", "MixtralConfig", _mixtral),
    "qwen3_moe": _family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _qwen3_moe),
    "phi3": _family("Phi3ForCausalLM", "Phi3Config", _phi3),
    "gemma3": _family("Gemma3ForCausalLM", "Gemma3TextConfig", _gemma3),
    "glm4": _family("Glm4ForCausalLM", "Glm4Config", _glm4),
    "gpt2": _family("GPT2LMHeadModel", "GPT2Config", _gpt2),
    "minicpm4": _build_minicpm4,
    "plain": _build_plain,
}
"""Name of a family -> its builder."""


def build(
    name: str, seed: int = 0, *, attn_implementation: AttnImplementation = "sdpa"
) -> nn.Module:
    """Build the tiny model `name`.

    Args:
        name: A key of `TINY_MODELS`.
        seed: 0 for the plain form; any other for a variation drawn from it: head counts, head
            size, layers, rotary base and scaling, biases, tied embeddings.
        attn_implementation: `sdpa` or `eager`; `plain` knows only `sdpa`.

    Returns:
        The model in eval mode, in fp32, on the CPU. The global random state is as before.

    Raises:
        KeyError: If there is no model of that name.
    """
    return TINY_MODELS[name](seed, attn_implementation=attn_implementation)


def tiny_llama(
    *,
    seed: int = 0,
    attn_implementation: AttnImplementation = "sdpa",
    **overrides: Any,
) -> LlamaForCausalLM:
    """Build a Llama of two layers, hidden 64, 4 heads, 2 KV heads of 16, vocabulary 256.

    Args:
        seed: Seed of the weights; the shape does not depend on it.
        attn_implementation: `sdpa` or `eager`.
        **overrides: Fields of `LlamaConfig` to set otherwise. `initializer_range` is the
            deviation of every matrix (default 0.2 at hidden 64; embeddings get 0.4 of it).

    Returns:
        The model in eval mode, in fp32, on the CPU. The global random state is as before.
    """
    model: LlamaForCausalLM = build_from_transformers(
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_Shape().fields(), **overrides},
        seed=seed,
        attn_implementation=attn_implementation,
        std=overrides.get("initializer_range"),
    )
    return model


def tiny_nosa(
    *, seed: int = 0, attn_implementation: AttnImplementation = "sdpa", **overrides: Any
) -> NosaForCausalLM:
    """Build a NOSA-style model in the shape of `tiny_llama`; each key carries a retention score.

    Args:
        seed: Seed of the weights; the shape does not depend on it.
        attn_implementation: `sdpa` or `eager`.
        **overrides: Fields of `LlamaConfig` to set otherwise.

    Returns:
        The model in eval mode, in fp32, on the CPU. The global random state is as before.
    """
    from sparda_compile.testing.nosa import NosaConfig, NosaForCausalLM

    config = NosaConfig(**{**_Shape().fields(), **overrides})
    model: NosaForCausalLM = build_from_config(
        NosaForCausalLM, config, seed=seed, attn_implementation=attn_implementation
    )
    return model
