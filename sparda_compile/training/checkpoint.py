"""Training checkpoints: everything that a run needs to go on as if it had not stopped.

A file is what `torch.save` writes, with the SHA-256 of its bytes in the comment of its zip archive:
a byte that changes, anywhere, is found before anything is read. Then each field is checked, since a
checksum says nothing about what was written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.errors import ConfigError
from sparda_compile.files import replacing
from sparda_compile.forecast.weights import ForecastInfo
from sparda_compile.training.fields import check_fields

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checkpoint", "checkpoint_path", "random_states", "restore_random_states"]

_KIND: Final = "sparda_compile training checkpoint, by name"
_TAG: Final = b"sha256:"
_COMMENT_BYTES: Final = len(_TAG) + 64


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
        fields = {name: getattr(self, name) for name in _FIELDS}
        content = io.BytesIO()
        torch.save({"kind": _KIND, **fields, "info": self.info.to_json()}, content)
        with replacing(path) as partial:
            partial.write_bytes(_sealed(content.getvalue()))

    @classmethod
    def load(cls, path: str | Path) -> Checkpoint:
        """Read a file, to the CPU.

        Raises:
            ConfigError: If there is none, it is no checkpoint of a training, its bytes have
                changed, or a field is not what a run writes.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(
                f"resume={str(path)!r} is no file; pass the .checkpoint file that the run wrote "
                "beside its output, or leave resume out to start again."
            )
        try:
            content = path.read_bytes()
            _check_seal(content)
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            _check_names(loaded)
            info = ForecastInfo.from_json(loaded["info"])
            found = {name: loaded[name] for name in _FIELDS}
            check_fields(info=info, **found)
            return cls(**found, info=info)
        except Exception as error:
            raise ConfigError(
                f"resume={str(path)!r} cannot be read as a training checkpoint ({error}); pass "
                "the .checkpoint file that the run wrote beside its output, or leave resume out "
                "to start again."
            ) from error


_FIELDS: Final = ("step", "num_batches", "weights", "optimizer", "rng")


def _sealed(content: bytes) -> bytes:
    """Return a zip archive with its checksum as the comment, which stands at its end."""
    assert content.endswith(b"\0\0"), "the archive has a comment already"
    body = content[:-2]
    comment = _TAG + hashlib.sha256(body).hexdigest().encode("ascii")
    return body + len(comment).to_bytes(2, "little") + comment


def _check_seal(content: bytes) -> None:
    """Raise ValueError if there is no checksum, or it is that of other bytes."""
    comment = content[-_COMMENT_BYTES:]
    if not comment.startswith(_TAG):
        raise ValueError("it has no checksum at its end: it was cut, or is not ours")
    if _sealed(content[: -_COMMENT_BYTES - 2] + b"\0\0") != content:
        raise ValueError("its checksum is that of other bytes: some of them were changed or lost")


def _check_names(loaded: Any) -> None:
    """Raise ValueError if a file holds other fields than a run writes."""
    kind = loaded.get("kind") if isinstance(loaded, dict) else type(loaded).__name__
    if kind != _KIND:
        raise ValueError(f"its kind is {kind!r:.80}")
    wanted = {"kind", "info", *_FIELDS}
    if set(loaded) != wanted:
        missing, unknown = wanted - set(loaded), set(loaded) - wanted
        raise ValueError(
            f"fields {sorted(missing)} are missing and {sorted(map(str, unknown))} unknown"
        )


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
