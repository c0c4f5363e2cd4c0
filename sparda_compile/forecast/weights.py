"""Forecast weights: one projection per layer, in a file that says what they were trained for.

A file is a safetensors file whose tensors are named by target layer (`0` is the bootstrap
projection of layer 0, `l` the projection that reads layer l - 1 and predicts layer l's query; one
of low rank is two tensors, `l_u` and `l_v`) and whose metadata has `sparda_forecast`, a JSON object
with the fields of `ForecastInfo`. A file of bare tensors is read too, and so are checkpoints of
SparDA's own training, whose projections are full:

    model.layers.0.self_attn.q_curr_proj.weight       target 0
    model.layers.{i}.self_attn.q_future_proj.weight   target i + 1; the last one is never used

Source: SparDA (arXiv 2606.04511), released checkpoints.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from sparda_compile.errors import ConfigError
from sparda_compile.files import check_writable, replacing
from sparda_compile.forecast.info import ForecastInfo
from sparda_compile.forecast.parts import parts_of
from sparda_compile.forecast.projection import Projection, ProjectionShape, from_tensors, to_tensors
from sparda_compile.ranks.agreement import ALONE
from sparda_compile.registry import SELECTORS, forecast_rule

if TYPE_CHECKING:
    from sparda_compile.config import SpardaConfig
    from sparda_compile.ranks.agreement import Ranks

__all__ = [
    "ForecastInfo",
    "ForecastWeights",
    "fit_forecast",
    "following_weights",
    "load_forecast",
    "projections_of",
    "rank_of",
]

_METADATA_KEY: Final = "sparda_forecast"
_RELEASED: Final = re.compile(
    r"(?:^|\.)layers\.(\d+)\.self_attn\.(q_future_proj|q_curr_proj)\.weight$"
)
_WRAPPERS: Final = ("state_dict", "model_state_dict", "model", "net", "weights")
_TORCH_SUFFIXES: Final = (".pt", ".pth", ".bin", ".ckpt")
_TRAIN_AGAIN: Final = "Pass the weights that were trained for this model."


@dataclasses.dataclass(frozen=True)
class ForecastWeights(Mapping[int, Tensor]):
    """Forecast projections by target layer; a mapping to their products, [G*F*D, hidden] each.

    Attributes:
        projections: The projections.
        info: What they were trained for; None if the file does not say.
        is_release: Whether they come from a checkpoint of SparDA's own training.
    """

    projections: dict[int, Projection]
    info: ForecastInfo | None = None
    is_release: bool = False

    def __getitem__(self, layer: int) -> Tensor:
        """Return the projection that predicts a layer's query, multiplied out."""
        return self.projections[layer].product()

    def __iter__(self) -> Iterator[int]:
        """Go through the target layers."""
        return iter(self.projections)

    def __len__(self) -> int:
        """Return the number of projections."""
        return len(self.projections)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file; folders are made, an old file is replaced at once.

        Returns:
            The path.

        Raises:
            ConfigError: If the file cannot be written; an old one stays as it was then.
        """
        from safetensors.torch import save_file

        path = check_writable(path)
        metadata = {"format": "pt"}
        if self.info is not None:
            metadata[_METADATA_KEY] = self.info.to_json()
        named = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in to_tensors(self.projections).items()
        }
        with replacing(path) as partial:
            save_file(named, partial, metadata=metadata)
        return path


def load_forecast(path: str | Path) -> ForecastWeights:
    """Return the Forecast weights of a file.

    Args:
        path: A safetensors file of this library, or a `.pt` or safetensors checkpoint with the
            names of SparDA's own training; other tensors of such a checkpoint are left out.

    Raises:
        ConfigError: If there is no file, it cannot be read, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"forecast={str(path)!r} is no file; pass a safetensors file that train_forecast or "
            "`sparda train` wrote, or a released .pt checkpoint."
        )
    try:
        tensors, metadata = _read(path)
        names = [name for name in tensors if _RELEASED.search(name)]
        if names:
            released = _released({name: tensors[name] for name in names})
            return ForecastWeights(projections_of(released), is_release=True)
        text = metadata.get(_METADATA_KEY)
        info = None if text is None else ForecastInfo.from_json(text)
        checked = {name: _checked_file(name, tensor) for name, tensor in tensors.items()}
        return ForecastWeights(from_tensors(checked), info)
    except Exception as error:
        raise ConfigError(
            f"forecast={str(path)!r} cannot be read as Forecast weights ({error}); it must be a "
            "safetensors file whose names are layer numbers, with _u and _v behind them for "
            "projections of low rank, or a checkpoint with "
            "model.layers.{i}.self_attn.q_future_proj.weight."
        ) from error


def _checked_file(name: str, tensor: Tensor) -> Tensor:
    number = name.partition("_")[0]
    return _checked(int(number) if number.isdecimal() else 0, tensor)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file by name, and its metadata."""
    if path.suffix in _TORCH_SUFFIXES:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
        opened: list[Any] = []
        while isinstance(loaded, Mapping):
            wrapped = next((loaded[key] for key in _WRAPPERS if key in loaded), None)
            if not isinstance(wrapped, Mapping):
                break
            if any(wrapped is each for each in opened):
                raise ValueError("a wrapper in it holds itself")
            opened.append(wrapped)
            loaded = wrapped
        if not isinstance(loaded, Mapping):
            raise ValueError(f"it holds a {type(loaded).__name__}, not named tensors")
        named = {
            str(name).removeprefix("module."): value
            for name, value in loaded.items()
            if isinstance(value, Tensor)
        }
        return named, {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping


def _released(named: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Return the projections of a released checkpoint by target layer."""
    tensors: dict[int, Tensor] = {}
    for name, tensor in named.items():
        match = _RELEASED.search(name)
        assert match is not None
        source, is_bootstrap = int(match[1]), match[2] == "q_curr_proj"
        if is_bootstrap and source:
            raise ValueError(f"{name} is the bootstrap projection of a layer other than 0")
        target = 0 if is_bootstrap else source + 1
        if target in tensors:
            raise ValueError(f"two tensors are for layer {target}, one of them {name}")
        tensors[target] = tensor
    return tensors


def projections_of(given: Mapping[int, Tensor]) -> dict[int, Projection]:
    """Return the projections of Forecast weights; bare tensors are full ones.

    Raises:
        ConfigError: If they are no mapping, or a tensor is no matrix of finite real numbers.
    """
    if isinstance(given, ForecastWeights):
        return given.projections
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"forecast is a {type(given).__name__}; pass a dict of a matrix for each layer, what "
            "train_forecast returned, or a file's path."
        )
    return {layer: Projection((_checked(layer, tensor),)) for layer, tensor in given.items()}


def _checked(layer: int, tensor: Tensor) -> Tensor:
    """Return a matrix of a layer's projection after a look at its numbers."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        raise ConfigError(
            f"forecast weights of layer {layer} are {kind}; a projection has floating-point "
            "numbers, such as float32 or bfloat16."
        )
    if not tensor.is_meta and not bool(torch.isfinite(tensor.float()).all()):
        raise ConfigError(
            f"forecast weights of layer {layer} hold NaN or infinity; the file is damaged, or its "
            "training has diverged. Use an earlier checkpoint."
        )
    return tensor


def rank_of(given: Mapping[int, Tensor], heads: int) -> int | None:
    """Return the `SpardaConfig.forecast_rank` that makes a program for Forecast weights.

    Args:
        given: Forecast weights by target layer.
        heads: Their heads for each KV head.
    """
    shapes = [each.shape for each in projections_of(given).values()]
    if all(each == ProjectionShape.of(each.rows, each.hidden, None, heads) for each in shapes):
        return None
    ranks = [shape.rank for shape in shapes if shape.rank is not None]
    # That of all rows is never less than full.
    return min(ranks) if ranks else max(shape.rows for shape in shapes)


def heads_of(given: Mapping[int, Tensor]) -> int:
    """Return the heads for each KV head that Forecast weights say they have; 1 if they do not."""
    info = given.info if isinstance(given, ForecastWeights) else None
    return 1 if info is None else info.heads


def following_weights(config: SpardaConfig, given: Mapping[int, Tensor] | None) -> SpardaConfig:
    """Return a configuration with the rank and the heads of Forecast weights where it has None.

    Raises:
        ConfigError: If the weights say that they have other heads than the configuration.
    """
    if given is None:
        return config
    if config.forecast_heads is None and heads_of(given) > 1:
        config = config.replace(forecast_heads=heads_of(given))
    if isinstance(given, ForecastWeights) and given.info is not None:
        _check_heads(given.info, config)
    if config.forecast_rank is None:
        config = config.replace(forecast_rank=rank_of(given, config.heads_of_forecast))
    return config


def fit_forecast(
    given: Mapping[int, Tensor],
    shapes: Mapping[int, ProjectionShape],
    model_name: str,
    config: SpardaConfig,
    ranks: Ranks = ALONE,
) -> dict[int, Projection]:
    """Return the projections that a model needs, checked.

    A warning says if they were trained for other blocks or pooled keys than `config` has.

    Args:
        given: Forecast weights by target layer.
        shapes: Sizes that the model's program has for each layer.
        model_name: Class name of the model.
        config: What they are to be used with.
        ranks: That share the KV heads; `given` has those of all.

    Raises:
        ConfigError: If they are another model's: a layer is missing or not in it, a shape differs,
            or the file names another model; or if their rank is not `config.forecast_rank`.
    """
    info = given.info if isinstance(given, ForecastWeights) else None
    projections = parts_of(projections_of(given), shapes, ranks)
    if isinstance(given, ForecastWeights) and given.is_release:
        projections.pop(max(shapes, default=0) + 1, None)
    _check_layers(projections, shapes, model_name)
    for layer, shape in shapes.items():
        _check_shape(layer, projections[layer].shape, shape, model_name)
    if info is not None and info.model != model_name:
        raise ConfigError(
            f"forecast weights were trained for {info.model}, but the model is a {model_name}. "
            f"{_TRAIN_AGAIN}"
        )
    if info is not None:
        _warn_of_sizes(info, config)
    return {layer: projections[layer] for layer in shapes}


def _check_heads(info: ForecastInfo, config: SpardaConfig) -> None:
    if info.heads != config.heads_of_forecast:
        raise ConfigError(
            f"forecast weights have {info.heads} heads for each KV head, but this configuration "
            f"has forecast_heads={config.heads_of_forecast}. Leave forecast_heads at None, so that "
            "the weights decide, or train them again with this configuration."
        )


def _check_shape(layer: int, found: ProjectionShape, needed: ProjectionShape, model: str) -> None:
    if (found.rows, found.hidden) != (needed.rows, needed.hidden):
        raise ConfigError(
            f"forecast weights of layer {layer} have shape {(found.rows, found.hidden)}, but "
            f"{model} needs {(needed.rows, needed.hidden)} (KV heads x forecast_heads x head_dim, "
            f"hidden). {_TRAIN_AGAIN}"
        )
    if found.rank != needed.rank:
        ranks = ["are full" if s.rank is None else f"have rank {s.rank}" for s in (found, needed)]
        raise ConfigError(
            f"forecast weights of layer {layer} {ranks[0]}, but those of this configuration "
            f"{ranks[1]}. Leave forecast_rank at None, so that the weights decide, or train them "
            "again with this configuration."
        )


def _check_layers(
    projections: Mapping[int, Projection], shapes: Mapping[int, ProjectionShape], model_name: str
) -> None:
    missing = sorted(set(shapes) - set(projections))
    unknown = sorted(set(projections) - set(shapes), key=str)
    if missing or unknown:
        raise ConfigError(
            f"forecast weights do not fit {model_name}: layers {missing} are missing and layers "
            f"{unknown} are not in it. {_TRAIN_AGAIN}"
        )


def _warn_of_sizes(info: ForecastInfo, config: SpardaConfig) -> None:
    differing = [
        f"{name}={getattr(config, name)} (trained with {size})"
        for name, size in info.sizes.items()
        if getattr(config, name) != size
    ]
    if _forecast_rule(info) != config.forecast_selector:
        differing.append(f"selector={config.selector} (trained with {info.selector})")
    if differing:
        warnings.warn(
            f"Forecast weights are used with {', '.join(differing)}; they then pick blocks less "
            "well. Use what they were trained with, or train them again.",
            stacklevel=5,
        )


def _forecast_rule(info: ForecastInfo) -> str:
    """Return the selector that Forecast weights were trained for."""
    known = info.selector in SELECTORS
    return forecast_rule(info.selector, info.heads) if known else info.selector
