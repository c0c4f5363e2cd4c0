"""A conversation's KV cache as a file: saved after one turn, loaded before the next.

A file is a safetensors file. Its tensors are the state of the cache by graph input name, a hint's
and a predictor's among it, and the tokens that were passed in, `passed_ids_i` and `passed_mask_i`.
Its metadata has `sparda_cache`, a JSON object with the fields of `SavedCache`: what model and what
settings the state is of, and where the conversation stands.

What is loaded goes on as if it had not been saved, bit for bit. So a file of another model, other
weights or other settings is refused. Weights are compared by 64 values of each tensor of the
model's state_dict; which adapters are active is not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.checks import whole
from sparda_compile.config import Blocks, Prediction, Selection
from sparda_compile.environment import version_of
from sparda_compile.errors import KVCacheError
from sparda_compile.files import check_writable, replacing
from sparda_compile.runtime.stored import restore, stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from sparda_compile.config import SpardaConfig
    from sparda_compile.runtime.kv_cache import KVCache
    from sparda_compile.state.layout import CacheLayout

__all__ = ["CacheFile", "SavedCache", "write_cache"]

# One of format 1 may have `fp8` with keys about 0, and keys in 2 bits by the names of 4.
FORMAT_VERSION: Final = 2
_METADATA_KEY: Final = "sparda_cache"
_NUM_SAMPLES: Final = 64
# Settings that decide what the state holds and means. The others say how a program is made, and how
# much memory it may take.
_SETTINGS: Final = (
    *(field.name for kind in (Selection, Prediction, Blocks) for field in dataclasses.fields(kind)),
    "page_ratio",
    "eviction",
    "kv_format",
    "page_format",
)
# Least values of what is counted.
_COUNTS: Final = {
    "batch_size": 1,
    "max_tokens": 1,
    "num_columns": 1,
    "longest": 0,
    "num_passed": 0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedCache:
    """What a file says of the cache in it.

    Attributes:
        model: Class name of the model.
        weights: By name in its state_dict, a hash of some values of each tensor.
        layers: Fields of each `LayerShape`, in order.
        settings: Fields of the configuration that the state depends on.
        is_offloaded: Whether full blocks are in CPU memory.
        batch_size: Sequences.
        max_tokens: Tokens per sequence that it has room for.
        num_columns: Tokens per sequence that were passed in, padding included.
        longest: Tokens of the longest sequence, padding left out.
        has_padding: Whether some token that was passed in is hidden.
        budgets: Budgets of mode `speculate` that were set by hand, by layer.
        num_passed: Pieces that the passed tokens are stored in.
        versions: Versions of this package and of torch that wrote it.
        format_version: Of this description.
    """

    model: str
    weights: dict[str, str]
    layers: list[dict[str, Any]]
    settings: dict[str, Any]
    is_offloaded: bool
    batch_size: int
    max_tokens: int
    num_columns: int
    longest: int
    has_padding: bool
    budgets: dict[str, int]
    num_passed: int
    versions: dict[str, str | None]
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(cls, model: nn.Module, kv: KVCache, **rest: Any) -> SavedCache:
        """Return the description of a cache.

        Args:
            model: The model that it belongs to.
            kv: Its memory.
            **rest: `has_padding`, `budgets` and `num_passed`.
        """
        return cls(
            model=type(model).__name__,
            weights=_hashes(model),
            layers=_layers(kv.layout),
            settings=_settings(kv.layout.config),
            is_offloaded=kv.layout.offload,
            batch_size=kv.layout.batch_size,
            max_tokens=kv.layout.max_tokens,
            num_columns=kv.num_columns,
            longest=kv.longest,
            versions={name: version_of(name) for name in ("sparda-compile", "torch")},
            **rest,
        )

    @classmethod
    def from_json(cls, text: str) -> SavedCache:
        """Read what `json.dumps` of the fields wrote.

        Raises:
            ValueError: If it is something else, or of another format.
        """
        fields = json.loads(text)
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version is {version}, this version reads {FORMAT_VERSION}")
        names = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != names:
            raise ValueError(f"its fields are {sorted(fields)}, not {sorted(names)}")
        for name, lowest in _COUNTS.items():
            whole(name, fields[name], lowest)
        kinds = {"weights": dict, "layers": list, "settings": dict, "budgets": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(fields[name], kind)]
        if wrong:
            raise ValueError(f"{wrong[0]} is a {type(fields[wrong[0]]).__name__}")
        return cls(**fields)

    def check(self, model: nn.Module, layout: CacheLayout) -> None:
        """Refuse a module that would not go on as the one that saved it.

        Args:
            model: The module's model.
            layout: Of its caches, with the file's sequences and tokens.

        Raises:
            KVCacheError: If something differs; the text names it.
        """
        differs = (
            _difference("the model is", self.model, type(model).__name__)
            or _first_layer(self.layers, _layers(layout))
            or _first("the setting", self.settings, _settings(layout.config))
            or _difference("full blocks in CPU memory:", self.is_offloaded, layout.offload)
            or _first_weight(self.weights, _hashes(model))
        )
        if differs:
            raise KVCacheError(
                f"{differs}. A cache goes on only as it began: load it with a module of the same "
                "model, weights and settings, or read the text again."
            )


@dataclasses.dataclass(frozen=True)
class CacheFile:
    """A file that was opened.

    Attributes:
        path: Where it is.
        info: What it says of itself.
        passed: Ids [B, T] int64, or None, and mask [B, T] bool of the tokens that were passed in.
    """

    path: Path
    info: SavedCache
    passed: list[tuple[Tensor | None, Tensor]]

    @classmethod
    def open(cls, path: Any) -> CacheFile:
        """Read all but the state.

        Raises:
            KVCacheError: If there is no file, or it is no saved cache.
        """
        from safetensors import safe_open

        if not isinstance(path, (str, os.PathLike)) or not Path(path).is_file():
            raise KVCacheError(f"{str(path)!r} is no file; pass one that SpardaCache.save wrote.")
        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_METADATA_KEY)
                if text is None:
                    raise ValueError(f"its metadata has no {_METADATA_KEY}")
                info = SavedCache.from_json(text)
                names = set(file.keys())
                passed = []
                for number in range(info.num_passed):
                    ids = f"passed_ids_{number}"
                    kept = file.get_tensor(ids) if ids in names else None
                    passed.append((kept, file.get_tensor(f"passed_mask_{number}")))
            return cls(path, info, passed)
        except Exception as error:
            raise _unreadable(path, error) from error

    def restore(self, kv: KVCache) -> None:
        """Put the state into an empty cache, which has to be one that `info.check` let through.

        Raises:
            KVCacheError: If the file holds other tensors.
        """
        from safetensors import safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                names = [name for name in file.keys() if not name.startswith("passed_")]  # noqa: SIM118 - no mapping
                restore(kv, {name: file.get_tensor(name) for name in names})
        except Exception as error:
            raise _unreadable(self.path, error) from error
        kv.advance(self.info.num_columns, self.info.longest)


def write_cache(
    path: Any, info: SavedCache, kv: KVCache, passed: Iterable[tuple[Tensor | None, Tensor]]
) -> Path:
    """Write a file; folders are made, an old file is replaced at once.

    Args:
        path: Of the file.
        info: What it says of itself.
        kv: The cache.
        passed: Ids and mask of the tokens that were passed in, in pieces.

    Raises:
        ConfigError: If it cannot be written; an old one stays as it was then.
    """
    from safetensors.torch import save_file

    target = check_writable(path)
    tensors = stored(kv)
    for number, (ids, mask) in enumerate(passed):
        if ids is not None:
            tensors[f"passed_ids_{number}"] = ids.cpu().contiguous()
        tensors[f"passed_mask_{number}"] = mask.cpu().contiguous()
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(dataclasses.asdict(info))}
    with replacing(target) as partial:
        save_file(tensors, partial, metadata=metadata)
    return target


def _unreadable(path: Path, error: Exception) -> KVCacheError:
    return KVCacheError(
        f"{str(path)!r} cannot be read as a saved cache ({error}); pass a file that "
        "SpardaCache.save wrote with this version."
    )


def _settings(config: SpardaConfig) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(
        json.dumps({name: getattr(config, name) for name in _SETTINGS})
    )
    return settings


def _layers(layout: CacheLayout) -> list[dict[str, Any]]:
    shapes = [dataclasses.asdict(shape) for shape in layout.layers]
    return [fields | {"dtype": str(fields["dtype"])} for fields in shapes]


def _hashes(model: nn.Module) -> dict[str, str]:
    """Return a hash of some values of each tensor of a model, by its name in the state_dict."""
    return {
        name: hashlib.sha256(b"".join(_samples(value))).hexdigest()[:16]
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def _samples(tensor: Tensor) -> Iterable[bytes]:
    """Yield form and evenly spaced values of a tensor, or of those that a quantised one is."""
    yield f"{tuple(tensor.shape)} {tensor.dtype}".encode()
    if hasattr(tensor, "__tensor_flatten__"):
        parts, _ = tensor.__tensor_flatten__()
        for part in parts:
            yield from _samples(getattr(tensor, part))
        return
    flat = tensor.detach().reshape(-1)
    place = torch.arange(min(_NUM_SAMPLES, len(flat)), device=flat.device)
    taken = flat[place * len(flat) // max(len(place), 1)]
    yield taken.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _difference(what: str, saved: Any, here: Any) -> str:
    return "" if saved == here else f"{what} {saved!r} in the file and {here!r} here"


def _first(what: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return a sentence on the first field that differs, '' if none does."""
    names = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
    return (
        _difference(f"{what} {names[0]} is", saved.get(names[0]), here.get(names[0]))
        if names
        else ""
    )


def _first_layer(saved: list[dict[str, Any]], here: list[dict[str, Any]]) -> str:
    if len(saved) != len(here):
        return _difference("layers with attention are", len(saved), len(here))
    pairs = zip(saved, here, strict=True)
    found = (_first(f"of layer {mine.get('layer')},", theirs, mine) for theirs, mine in pairs)
    return next(filter(None, found), "")


def _first_weight(saved: Mapping[str, str], here: Mapping[str, str]) -> str:
    names = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
    if not names:
        return ""
    return (
        f"the weights are others: of {len(here)} tensors {len(names)} differ, one of them "
        f"{names[0]}"
    )
