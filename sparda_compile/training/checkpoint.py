"""Training checkpoints: everything that a run needs to go on as if it had not stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.errors import ConfigError
from sparda_compile.forecast.weights import ForecastInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checkpoint", "checkpoint_path", "random_states", "restore_random_states"]

_KIND: Final = "sparda_compile training checkpoint, by name"


def checkpoint_path(out: str | Path) -> Path:
    """Return where the checkpoints of a run that writes `out` are."""
    out = Path(out)
    return out.with_name(out.name + ".checkpoint")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        step: Optimizer steps done.
        num_batches: Batches used so far, by all processes together.
        weights: Float32 master weights, by the names of `forecast/projection.py`.
        optimizer: State of AdamW.
        rng: Random states of torch, on the CPU and, if there is one, on the GPU.
        info: What the weights are for.
    """

    step: int
    num_batches: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: dict[str, Tensor]
    info: ForecastInfo

    def save(self, path: Path) -> None:
        """Write the file; an old one is replaced at once, so a crash leaves one of the two."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {name: getattr(self, name) for name in _FIELDS}
        partial = path.with_name(path.name + ".partial")
        torch.save({"kind": _KIND, **fields, "info": self.info.to_json()}, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Checkpoint:
        """Read a file, to the CPU.

        Raises:
            ConfigError: If there is none, or it is no checkpoint of a training.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(
                f"resume={str(path)!r} is no file; pass the .checkpoint file that the run wrote "
                "beside its output, or leave resume out to start again."
            )
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            if loaded["kind"] != _KIND:
                raise ValueError(f"its kind is {loaded['kind']!r}")
            info = ForecastInfo.from_json(loaded["info"])
            return cls(**{name: loaded[name] for name in _FIELDS}, info=info)
        except Exception as error:
            raise ConfigError(
                f"resume={str(path)!r} cannot be read as a training checkpoint ({error}); pass "
                "the .checkpoint file that the run wrote beside its output."
            ) from error


_FIELDS: Final = ("step", "num_batches", "weights", "optimizer", "rng")


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Set the states of torch's random generators."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
