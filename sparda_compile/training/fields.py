"""What each field of a training checkpoint has to be.

Files come from disks and from other people: each value is looked at for type, shape and finiteness
before a run takes it over. What broadcasts, converts or wraps around would be taken in silence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparda_compile.forecast.weights import ForecastInfo
    from sparda_compile.training.checkpoint import Checkpoint

__all__ = ["check_fields", "check_fits"]

_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
_SAME_MODEL: Final = ("model", "layers", "groups", "head_dim", "hidden", "ranks", "heads")
_SAME_SIZES: Final = ("block_size", "pool_size", "pool_stride", "top_k", "selector")
_SETTINGS: Final = ("betas", "eps", "weight_decay")
_CUDA_RNG_BYTES: Final = 16
_MOST_BATCHES: Final = 1 << 20


def check_fields(
    *, step: Any, num_batches: Any, weights: Any, optimizer: Any, rng: Any, info: ForecastInfo
) -> None:
    """Check the fields of a checkpoint, each alone and against the others.

    Raises:
        ValueError: If one is not what a run writes; the text names it.
    """
    _whole("step", step, 0)
    # More would be skipped one by one before the first step.
    _whole("num_batches", num_batches, step, step * _MOST_BATCHES)
    if info.steps != step:
        raise ValueError(f"step is {step}, but info says steps={info.steps}")
    _dictionary("weights", weights)
    if not weights:
        raise ValueError("weights is empty")
    for name, weight in weights.items():
        if not isinstance(name, str):
            raise ValueError(f"weights has the name {name!r}, which is no string")
        _numbers(f"weights[{name!r}]", weight)
    _optimizer(optimizer, list(weights.values()), step)
    _random(rng)


def check_fits(
    checkpoint: Checkpoint,
    info: ForecastInfo,
    parameters: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
) -> None:
    """Check a checkpoint against the run that is to go on from it.

    Args:
        checkpoint: What was loaded.
        info: What the run trains.
        parameters: Its weights, by name.
        optimizer: State of its AdamW.

    Raises:
        ConfigError: If it is of another model or other sizes, a weight has another shape, or a
            setting of AdamW other than the learning rate differs.
    """
    for name in (*_SAME_MODEL, *_SAME_SIZES):
        here, there = getattr(info, name), getattr(checkpoint.info, name)
        if here != there:
            raise ConfigError(
                f"the checkpoint was trained with {name}={there}, this run has {name}={here}; "
                "resume with the same model and configuration."
            )
    found = {name: tuple(weight.shape) for name, weight in checkpoint.weights.items()}
    needed = {name: tuple(weight.shape) for name, weight in parameters.items()}
    if list(found.items()) != list(needed.items()):
        raise ConfigError(
            f"the checkpoint has weights of the shapes {found}, this run needs {needed}; the file "
            "is damaged. Use an earlier checkpoint, or start again."
        )
    theirs, ours = (state["param_groups"][0] for state in (checkpoint.optimizer, optimizer))
    # Other versions of torch have more or fewer of the other names.
    shared = {name for name in ours if name in theirs} - {"lr"}
    for name in sorted({*shared, *_SETTINGS}):
        same = name in theirs and type(theirs[name]) is type(ours[name])
        if not same or theirs[name] != ours[name]:
            raise ConfigError(
                f"the checkpoint has {name}={theirs.get(name)!r:.80} in its optimizer, this run "
                f"{name}={ours[name]!r}; the file is damaged. Use an earlier checkpoint, or start "
                "again."
            )


def _optimizer(optimizer: Any, weights: list[Tensor], step: int) -> None:
    _dictionary("optimizer", optimizer)
    if set(optimizer) != {"state", "param_groups"}:
        raise ValueError(f"optimizer has {sorted(map(str, optimizer))}, not state and param_groups")
    state, groups = optimizer["state"], optimizer["param_groups"]
    _dictionary("optimizer.state", state)
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("optimizer.param_groups is no list of dictionaries")
    numbers = list(range(len(weights)))
    if [group.get("params") for group in groups] != [numbers]:
        raise ValueError(f"optimizer.param_groups is not one group of {len(weights)} weights")
    rate = groups[0].get("lr")
    if not isinstance(rate, float) or not 0.0 < rate < float("inf"):
        raise ValueError(f"optimizer.lr is {rate!r:.80}, not a number above 0")
    if any(isinstance(number, bool) for number in state) or list(state) != numbers[: len(state)]:
        raise ValueError(f"optimizer.state is of {list(state)!r:.80}, not of {numbers!r:.80}")
    if len(state) != (len(weights) if step else 0):
        raise ValueError(f"optimizer.state has {len(state)} of {len(weights)} weights")
    for number, weight in enumerate(weights[: len(state)]):
        _moments(f"optimizer.state[{number}]", state[number], weight, step)


def _moments(name: str, moments: Any, weight: Tensor, step: int) -> None:
    """Check what AdamW remembers of one weight."""
    _dictionary(name, moments)
    if set(moments) != {"step", *_MOMENTS}:
        raise ValueError(f"{name} has {sorted(map(str, moments))}, not step, exp_avg, exp_avg_sq")
    _numbers(f"{name}.step", moments["step"], ())
    count = float(moments["step"])
    if not 1 <= count <= step or count != int(count):
        raise ValueError(f"{name}.step is {count:g}, but the run has done {step} steps")
    for moment in _MOMENTS:
        _numbers(f"{name}.{moment}", moments[moment], tuple(weight.shape))
    if bool((moments["exp_avg_sq"] < 0).any()):
        raise ValueError(f"{name}.exp_avg_sq, a mean of squares, has negative numbers")


def _random(rng: Any) -> None:
    _dictionary("rng", rng)
    if set(rng) not in ({"cpu"}, {"cpu", "cuda"}):
        raise ValueError(f"rng is of {sorted(map(str, rng))}, not of cpu and, on a GPU, cuda")
    sizes = {"cpu": torch.get_rng_state().numel(), "cuda": _CUDA_RNG_BYTES}
    for device, state in rng.items():
        is_state = _is_plain(state) and state.dtype == torch.uint8
        if not is_state or tuple(state.shape) != (sizes[device],):
            raise ValueError(f"rng.{device} is {_described(state)}, not {sizes[device]} bytes")
    try:
        torch.Generator().set_state(rng["cpu"])
    except RuntimeError as error:
        raise ValueError("rng.cpu is no state of torch's random generator") from error


def _numbers(name: str, value: Any, shape: tuple[int, ...] | None = None) -> None:
    """Check that a value is a dense float32 tensor of finite numbers, of a shape."""
    if not _is_plain(value) or value.dtype != torch.float32:
        raise ValueError(f"{name} is {_described(value)}, not a tensor of float32")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, not {shape}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds NaN or infinity")


def _is_plain(value: Any) -> bool:
    is_tensor = isinstance(value, Tensor)
    return is_tensor and value.layout == torch.strided and value.device.type == "cpu"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype} ({value.layout}, {value.device})"
    return f"{type(value).__name__}"


def _dictionary(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {_described(value)}, not a dictionary")


def _whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is {_described(value)}, not a whole number")
    if value < least:
        raise ValueError(f"{name} is {value}, less than {least}")
    if most is not None and value > most:
        raise ValueError(f"{name} is {value}, more than {most}")
