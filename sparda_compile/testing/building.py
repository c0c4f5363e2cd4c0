"""Random weights that make a tiny model behave: peaked attention and a lively greedy decode."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["AttnImplementation", "build_from_config", "build_from_transformers", "fill_weights"]

AttnImplementation = Literal["sdpa", "eager"]

_SPREAD: Final = 1.6
_EMBEDDING_SHARE: Final = 0.4
_VECTOR_NOISE: Final = 0.1
_QUERY_NORM_LIFT: Final = 1.5
_QUERY_NORMS: Final = ("q_norm", "q_layernorm", "query_layernorm")


@torch.no_grad()
def fill_weights(
    model: nn.Module, *, hidden_size: int, seed: int, std: float | None = None
) -> None:
    """Draw every parameter of `model` again, from a generator of its own.

    Matrices become normal with deviation `std`; embeddings with less, or a head that is tied to
    them would only ever repeat the last token. Vectors (norm weights and biases, which most
    constructors leave at exactly one or zero) are moved a little, so that code which forgets
    one of them is seen to be wrong; the weights of query norms are lifted too, since unit
    queries and keys would attend almost evenly. Drawing in the order of the names makes the
    weights independent of how a constructor draws them.

    Args:
        model: Model to change in place.
        hidden_size: Width of its hidden states; sets the default deviation.
        seed: Seed of the generator.
        std: Deviation of the matrices; None is 1.6 over the square root of `hidden_size`.
    """
    generator = torch.Generator().manual_seed(seed)
    deviation = _SPREAD / hidden_size**0.5 if std is None else std
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    for name, parameter in sorted(model.named_parameters()):
        noise: Tensor = torch.randn(parameter.shape, generator=generator)
        if any(parameter is weight for weight in embeddings):
            parameter.copy_(noise * deviation * _EMBEDDING_SHARE)
        elif parameter.ndim >= 2:
            parameter.copy_(noise * deviation)
        else:
            lift = _QUERY_NORM_LIFT if any(norm in name for norm in _QUERY_NORMS) else 0.0
            parameter.add_(noise * _VECTOR_NOISE + lift)


def build_from_transformers(
    model_name: str,
    config_name: str,
    fields: Mapping[str, Any],
    *,
    seed: int,
    attn_implementation: AttnImplementation,
    std: float | None = None,
) -> Any:
    """Build a model of transformers, which is imported here, with the weights of `seed`.

    Args:
        model_name: Class of the model, looked up in transformers.
        config_name: Class of its config, looked up in transformers.
        fields: Fields of the config.
        seed: Seed of the weights.
        attn_implementation: `sdpa` or `eager`.
        std: As in `fill_weights`.

    Returns:
        The model in eval mode, in fp32, on the CPU. The global random state is as before.
    """
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, config_name)(**fields)
    return build_from_config(
        getattr(transformers, model_name),
        config,
        seed=seed,
        attn_implementation=attn_implementation,
        std=std,
    )


def build_from_config(
    model_class: Any,
    config: Any,
    *,
    seed: int,
    attn_implementation: AttnImplementation,
    std: float | None = None,
) -> Any:
    """Do what `build_from_transformers` does, for a model class and config at hand."""
    config._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        model = model_class(config)
    fill_weights(model, hidden_size=config.hidden_size, seed=seed, std=std)
    return model.eval()
