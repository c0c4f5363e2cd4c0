"""Batches of token ids: from a text, from a data set on disk, or the caller's own.

Training takes any iterable of int64 tensors [B, T]. What is made here can be gone through again,
which training does when it ends.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from sparda_compile.errors import BackendUnavailableError, ConfigError, UnsupportedInputError

if TYPE_CHECKING:
    from sparda_compile.config import SpardaConfig

__all__ = [
    "BYTES",
    "DatasetBatches",
    "Tokenize",
    "check_batch",
    "endless",
    "load_dataset",
    "load_tokenizer",
    "shortest_sequence",
    "text_batches",
    "token_chunks",
]

Tokenize = Callable[[str], Sequence[int]]
BYTES: Final = "bytes"


def shortest_sequence(config: SpardaConfig) -> int:
    """Return the tokens that a sequence needs for one query to have a block to choose."""
    return max(config.num_forced * config.block_size + 1, config.pool_size)


def check_batch(ids: Tensor, config: SpardaConfig, vocab_size: int | None) -> None:
    """Check one batch.

    Raises:
        UnsupportedInputError: If it is not [B, T] int64, too short to train on, or has ids that
            the model does not know; these are looked at on the CPU alone.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or not len(ids):
        found = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise UnsupportedInputError(
            f"a batch is {found}; pass token ids as a tensor [B, T] of int64."
        )
    least = shortest_sequence(config)
    if ids.shape[1] < least:
        raise UnsupportedInputError(
            f"a batch has {ids.shape[1]} tokens per sequence, but sink, local and current blocks "
            f"cover the first {least - 1}, so a Forecast has nothing to choose; pass {least} or "
            "more, or lower local_blocks or block_size."
        )
    if vocab_size is None or ids.device.type != "cpu":
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise UnsupportedInputError(
            f"a batch has token ids from {low} to {high}, but the model knows 0 to "
            f"{vocab_size - 1}; use the tokenizer of this model."
        )


def endless(
    batches: Iterable[Tensor], num_used: int, rank: int, world_size: int
) -> Iterator[Tensor]:
    """Yield every `world_size`-th batch, again and again.

    Args:
        batches: Of all processes.
        num_used: Batches to leave out, used before a resumption.
        rank: Which of the others this process takes.
        world_size: Processes.

    Raises:
        ConfigError: If there is no batch, or there are no more and they cannot be gone through
            again.
    """
    number = -num_used
    for epoch in itertools.count():
        iterator = iter(batches)
        is_spent = iterator is batches and epoch > 0
        before = number
        for ids in iterator:
            if number >= 0 and number % world_size == rank:
                yield ids
            number += 1
        if number == before:
            count = number + num_used
            raise ConfigError(
                f"token_batches ended after {count} batches and cannot be gone through again; pass "
                "a list or another iterable that can, or lower steps."
                if is_spent
                else "token_batches is empty; pass at least one batch of token ids."
            )


def load_tokenizer(name: str | Path) -> Tokenize:
    """Return what turns text into token ids.

    Args:
        name: `bytes`, one id from 0 to 255 per byte of UTF-8; or a folder with the tokenizer that
            transformers' `save_pretrained` wrote.

    Raises:
        ConfigError: If it is neither.
    """
    if name == BYTES:
        return lambda text: list(text.encode("utf-8"))
    if not Path(name).is_dir():
        raise ConfigError(
            f"tokenizer={str(name)!r} is no folder; pass the folder of a tokenizer, or {BYTES!r}."
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception as error:
        raise ConfigError(
            f"transformers cannot load a tokenizer from {str(name)!r} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); pass the "
            f"folder that its save_pretrained wrote, or {BYTES!r}."
        ) from error
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def token_chunks(ids: Sequence[int] | Tensor, length: int, batch_size: int) -> list[Tensor]:
    """Cut a run of token ids into batches [B, T], in order; the rest is left out.

    Raises:
        ConfigError: If there are fewer ids than one batch needs.
    """
    _at_least_one(length=length, batch_size=batch_size)
    flat = torch.as_tensor(ids, dtype=torch.int64).flatten()
    per_batch = length * batch_size
    if len(flat) < per_batch:
        raise ConfigError(
            f"the text has {len(flat)} tokens, but one batch of {batch_size} sequences of {length} "
            f"tokens needs {per_batch}; pass a longer text, or lower length or batch."
        )
    whole = flat[: len(flat) // per_batch * per_batch]
    return list(whole.view(-1, batch_size, length))


def text_batches(
    path: str | Path, tokenize: Tokenize, *, length: int, batch_size: int
) -> list[Tensor]:
    """Read a text file as batches.

    Args:
        path: A file of UTF-8.
        tokenize: From `load_tokenizer`.
        length: Tokens of one sequence, T.
        batch_size: Sequences of one batch, B.

    Returns:
        Batches [B, T] int64.

    Raises:
        ConfigError: If the file cannot be read, is no text, or is too short.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"text={str(path)!r} cannot be read ({error}); pass a file of UTF-8 text."
        ) from error
    return token_chunks(tokenize(text), length, batch_size)


@dataclasses.dataclass(frozen=True)
class DatasetBatches:
    """Batches of the samples of a data set, in its order.

    The first `length` ids of each sample that has so many, as the paper takes them; shorter
    samples are left out.

    Attributes:
        samples: Mappings with `input_ids`, or with `text`.
        tokenize: For samples with `text`; None if they have `input_ids`.
        length: Tokens of one sequence, T.
        batch_size: Sequences of one batch, B.
    """

    samples: Iterable[Any]
    tokenize: Tokenize | None
    length: int
    batch_size: int

    def __iter__(self) -> Iterator[Tensor]:
        """Yield batches [B, T] int64; samples that do not fill the last one are left out."""
        rows: list[Tensor] = []
        is_empty = True
        for sample in self.samples:
            ids = self.tokenize(sample["text"]) if self.tokenize else sample["input_ids"]
            if len(ids) < self.length:
                continue
            rows.append(torch.as_tensor(ids[: self.length], dtype=torch.int64))
            if len(rows) == self.batch_size:
                yield torch.stack(rows)
                rows, is_empty = [], False
        if is_empty:
            raise ConfigError(
                f"only {len(rows)} samples of the data set have {self.length} tokens or more, "
                f"which do not fill a batch of {self.batch_size}; lower length or batch, or pass "
                "longer samples."
            )


def load_dataset(
    path: str | Path, tokenize: Tokenize | None, *, length: int, batch_size: int
) -> DatasetBatches:
    """Open a data set that Hugging Face datasets saved with `save_to_disk`.

    Args:
        path: Its folder.
        tokenize: From `load_tokenizer`, for a column `text`; not used for a column `input_ids`.
        length: Tokens of one sequence, T.
        batch_size: Sequences of one batch, B.

    Raises:
        BackendUnavailableError: If the package `datasets` is not installed.
        ConfigError: If there is no such data set, or it has neither column.
    """
    _at_least_one(length=length, batch_size=batch_size)
    if not Path(path).is_dir():
        raise ConfigError(f"dataset={str(path)!r} is no folder; pass what save_to_disk wrote.")
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise BackendUnavailableError(
            "reading a data set needs the package datasets, which is not installed; install it "
            "(pip install datasets), or pass a text file."
        ) from error
    try:
        samples: Any = load_from_disk(str(path))
    except Exception as error:
        raise ConfigError(
            f"dataset={str(path)!r} cannot be read ({error}); pass the folder that save_to_disk "
            "wrote."
        ) from error
    columns = getattr(samples, "column_names", None)
    if not isinstance(columns, list):
        raise ConfigError(
            f"dataset={str(path)!r} has several splits ({', '.join(map(str, columns or ()))}); "
            "pass the folder of one of them."
        )
    if "input_ids" in columns:
        return DatasetBatches(samples, None, length, batch_size)
    if "text" not in columns or tokenize is None:
        raise ConfigError(
            f"dataset={str(path)!r} has the columns {', '.join(columns)}; training needs "
            "input_ids, or text together with a tokenizer."
        )
    return DatasetBatches(samples, tokenize, length, batch_size)


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name}={value} is too small; use 1 or more.")
