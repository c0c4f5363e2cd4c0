"""Documents: text files and folders of them, read, named, hashed and cut into tokens.

A file that is named has to be text and long enough. Of a folder, files that are neither are left
out, and listed: a folder of a project's documentation has pictures and stubs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

__all__ = ["Document", "Documents", "begin_ids", "read_documents", "token_ids"]


@dataclasses.dataclass(frozen=True)
class Document:
    """A text as tokens.

    Attributes:
        name: Of its file; with its folder's name before it where a folder was named.
        sha256: Of the file's bytes.
        ids_T: [T] int64 tokens, without special ones.
    """

    name: str
    sha256: str
    ids_T: Tensor


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents, what a text begins with, and what was left out.

    Attributes:
        each: The documents, in the order of their names where a folder was named.
        begin: Tokens that the tokenizer puts before a text: none, or one.
        left_out: Files of folders that are no text, or too short, by the reason.
    """

    each: tuple[Document, ...]
    begin: list[int]
    left_out: dict[str, str]

    def plain(self) -> list[dict[str, Any]]:
        """Return names, hashes and lengths, for JSON."""
        return [
            {"name": each.name, "sha256": each.sha256, "tokens": len(each.ids_T)}
            for each in self.each
        ]


def read_documents(paths: Sequence[Path], tokenizer: Any, least: int) -> Documents:
    """Read text files.

    Args:
        paths: Files, and folders whose files are taken too, hidden ones aside.
        tokenizer: Of the model.
        least: Tokens that each must have.

    Raises:
        ConfigError: If there is no such file, one that is named is no text or too short, two are
            the same text, or nothing is left.
    """
    begin = begin_ids(tokenizer)
    found: list[Document] = []
    left_out: dict[str, str] = {}
    hashes: dict[str, str] = {}
    names: set[str] = set()
    files = [*_files(paths)]

    def read(file: tuple[Path, str, bool]) -> Document | ConfigError:
        try:
            return _read(*file[:2], tokenizer, least - len(begin))
        except ConfigError as error:
            return error

    # Tokenizers in Rust let other threads run: a corpus has thousands of files.
    with ThreadPoolExecutor() as pool:
        for (_, name, is_named), document in zip(files, pool.map(read, files), strict=True):
            if isinstance(document, ConfigError):
                if is_named:
                    raise document
                left_out[name] = str(document).partition(";")[0]
                continue
            same = hashes.get(document.sha256)
            if same is not None:
                raise ConfigError(
                    f"{name} and {same} are the same text, which would count twice; name one."
                )
            if name in names:
                document = dataclasses.replace(document, name=f"{name} {document.sha256[:8]}")
            hashes[document.sha256] = name
            names.add(name)
            found.append(document)
    if not found:
        raise ConfigError(
            f"none of the {len(left_out)} files in the folders is a text of {least} tokens or "
            "more; name longer texts, or lower length."
        )
    return Documents(tuple(found), begin, left_out)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a piece of text, without special ones around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def begin_ids(tokenizer: Any) -> list[int]:
    """Return what a tokenizer puts before every text: its first token, or nothing."""
    first = tokenizer.bos_token_id
    with_special = tokenizer("a", verbose=False)["input_ids"]
    return [first] if first is not None and with_special[:1] == [first] else []


def _files(paths: Sequence[Path]) -> Iterator[tuple[Path, str, bool]]:
    """Yield each file with the name to show, and whether it was named itself."""
    for path in paths:
        if path.is_file():
            yield path, path.name, True
        elif path.is_dir():
            for file in sorted(path.rglob("*")):
                inner = file.relative_to(path)
                if file.is_file() and not any(part.startswith(".") for part in inner.parts):
                    yield file, f"{path.resolve().name}/{inner.as_posix()}", False
        else:
            raise ConfigError(f"{path} is neither a file nor a folder; name a text file.")


def _read(path: Path, name: str, tokenizer: Any, least: int) -> Document:
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; name another file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} is no text: its byte {error.start} is not UTF-8; name a file in UTF-8."
        ) from error
    if "\0" in text:
        raise ConfigError(f"{name} is no text: it holds null bytes; name a file in UTF-8.")
    ids = token_ids(tokenizer, text)
    if not ids:
        raise ConfigError(f"{name} is empty; name a file with text in it.")
    if len(ids) < least:
        raise ConfigError(
            f"{name} has {len(ids)} tokens, fewer than the {least} that are read of each text; "
            "name a longer text, or lower length."
        )
    return Document(name, hashlib.sha256(content).hexdigest(), torch.tensor(ids))
