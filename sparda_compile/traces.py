"""Traces: the ids of the blocks that a model selected on real text, step by step, in a file.

A file is a safetensors file with one tensor for each recording, [L, S, G, K], by its number. Its
metadata has `sparda_trace`, a JSON object: the model, the sizes, and what each recording is of. Ids
are of blocks chosen by score; sink, local and current blocks are read anyway and left out.

Dimensions: L layers, S decode steps, G KV heads, K chosen blocks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.errors import ConfigError
from sparda_compile.files import check_writable, replacing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = ["Recording", "TraceFile", "load_traces"]

_METADATA_KEY: Final = "sparda_trace"
_FORMAT_VERSION: Final = 1
_FIELDS: Final = ("text", "sha256", "selector", "share", "num_tokens", "sink_blocks", "num_free")
# Of a talk alone.
_ANSWERS: Final = "answers"


@dataclasses.dataclass(frozen=True)
class Recording:
    """What one selector chose on one text at one budget.

    Attributes:
        text: Name of the text.
        sha256: Of its bytes; of a talk, of those of the document that it is about.
        selector: By the layer's own query.
        share: Of the blocks that a step reads, those always read counted in.
        num_tokens: Tokens before the first step.
        sink_blocks: First blocks, always read; the id of the first block that can be chosen.
        num_free: Blocks behind them that could be chosen in the last step.
        ids_LSGK: Ascending ids of the chosen blocks, uint8 or int16.
        answers: Of a talk, the steps of each answer, which stand behind each other; questions are
            read between them, without steps. Empty where a text was fed.
    """

    text: str
    sha256: str
    selector: str
    share: float
    num_tokens: int
    sink_blocks: int
    num_free: int
    ids_LSGK: Tensor
    answers: tuple[int, ...] = ()

    @property
    def case(self) -> str:
        """Selector and budget, `infllm2 10%`."""
        return f"{self.selector} {100 * self.share:g}%"

    def overlap_by_layer(self) -> list[float]:
        """Return for each layer the share of a step's blocks that the step before chose too."""
        ids = self.ids_LSGK.long()
        kept = (ids[:, 1:, :, :, None] == ids[:, :-1, :, None, :]).any(-1)
        overlaps: list[float] = kept.double().mean((1, 2, 3)).tolist()
        return overlaps


@dataclasses.dataclass(frozen=True)
class TraceFile:
    """Recordings of one model.

    Attributes:
        model: Name, weights and dtype, as plain data.
        block_size: Tokens of one block.
        recordings: What was recorded.
        sha256: Of the file; empty before it is one.
    """

    model: dict[str, Any]
    block_size: int
    recordings: tuple[Recording, ...]
    sha256: str = ""

    def cases(self) -> dict[str, list[Recording]]:
        """Return the recordings by selector and budget, in the order of the file."""
        found: dict[str, list[Recording]] = {}
        for recording in self.recordings:
            found.setdefault(recording.case, []).append(recording)
        return found

    def save(self, path: Path) -> None:
        """Write the file; folders are made, an old file is replaced at once.

        Raises:
            ConfigError: If it cannot be written.
        """
        from safetensors.torch import save_file

        head = {
            "format_version": _FORMAT_VERSION,
            "model": self.model,
            "block_size": self.block_size,
            "recordings": [_plain(each) for each in self.recordings],
        }
        tensors = {str(n): each.ids_LSGK.contiguous() for n, each in enumerate(self.recordings)}
        with replacing(check_writable(path)) as partial:
            save_file(tensors, partial, metadata={_METADATA_KEY: json.dumps(head)})


def load_traces(path: Path) -> TraceFile:
    """Read a file that `TraceFile.save` wrote.

    Raises:
        ConfigError: If there is none, or it holds something else.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise ConfigError(
            f"trace={str(path)!r} is no file; pass one that `sparda eval trace` wrote."
        )
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {})[_METADATA_KEY])
            if head["format_version"] != _FORMAT_VERSION:
                raise ValueError(f"its format_version is {head['format_version']}")
            recordings = tuple(
                _recording(file.get_tensor(str(number)), fields)
                for number, fields in enumerate(head["recordings"])
            )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return TraceFile(head["model"], int(head["block_size"]), recordings, digest)
    except Exception as error:
        raise ConfigError(
            f"trace={str(path)!r} cannot be read as a trace ({error}); pass a file that "
            "`sparda eval trace` wrote."
        ) from error


def _plain(recording: Recording) -> dict[str, Any]:
    fields = {name: getattr(recording, name) for name in _FIELDS}
    return {**fields, _ANSWERS: recording.answers} if recording.answers else fields


def _recording(ids: Tensor, fields: Mapping[str, Any]) -> Recording:
    """Return a recording after a look at its ids."""
    answers = tuple(fields.get(_ANSWERS, ()))
    recording = Recording(ids_LSGK=ids, **{**fields, _ANSWERS: answers})
    if ids.dim() != 4 or ids.dtype not in (torch.uint8, torch.int16) or not ids.numel():
        raise ValueError(f"ids are {tuple(ids.shape)} {ids.dtype}, not [L, S, G, K] uint8 or int16")
    first = recording.sink_blocks
    low, high = int(ids.min()), int(ids.max())
    if low < first or high >= first + recording.num_free:
        raise ValueError(
            f"ids are {low} to {high}; {first} to {first + recording.num_free - 1} can be chosen"
        )
    if not bool((ids[..., 1:].int() > ids[..., :-1].int()).all()):
        raise ValueError("ids of a step are not ascending")
    if answers and sum(answers) != ids.shape[1]:
        raise ValueError(f"answers of {sum(answers)} steps are not the {ids.shape[1]} there are")
    return recording
