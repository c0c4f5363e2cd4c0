"""A JSON file of an evaluation, written part by part, from which it goes on.

A part is one task at one length; an evaluation that was stopped loses the part that it was in. What
a file holds was measured in this environment and with these settings, the date aside, and stays in
it: more tasks, lengths and configurations are added. A file of something else is refused, and left
as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from sparda_compile.environment import result_to_go_on, write_result
from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.guesses import Guess
from sparda_compile.evaluation.run import Evaluation, EvaluationRow, Recall

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = ["EvaluationFile", "fingerprint"]


class EvaluationFile:
    """Rows of an evaluation, kept in a file.

    Args:
        path: The file; None keeps nothing.
        model: Class of the model.
        seed: Seed of the sequences.
        settings: What else decides the numbers of a row, as plain data.

    Raises:
        ConfigError: If there is a file that was made with something else.
    """

    def __init__(self, path: Path | None, model: str, seed: int, settings: dict[str, Any]) -> None:
        self.path = path
        self.model = model
        self.seed = seed
        self.settings = settings
        self.rows: list[EvaluationRow] = []
        self._kept: dict[tuple[str, int, str], EvaluationRow] = {}
        if path is not None and path.exists():
            self._kept = {_key(row): row for row in self._found(path)}

    def keep(self, task: str, length: int, names: Iterable[str]) -> bool:
        """Take over a part if the file has a row for each configuration."""
        keys = [(task, length, name) for name in names]
        if not all(key in self._kept for key in keys):
            return False
        self.rows += [self._kept[key] for key in keys]
        return True

    def save(self, rows: Sequence[EvaluationRow]) -> None:
        """Add a part and write the file."""
        self.rows += rows
        if self.path is not None:
            self._kept |= {_key(row): row for row in rows}
            everything = Evaluation(self.model, self.seed, tuple(self._kept.values()))
            write_result(self.path, {**everything.to_dict(), "settings": self.settings})

    def _found(self, path: Path) -> list[EvaluationRow]:
        head = {"model": self.model, "seed": self.seed, "settings": self.settings}
        found = result_to_go_on(path, head, ["rows"])
        try:
            return [_row(plain) for plain in found["rows"]]
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no file of this command; give another one.") from error

    def evaluation(self) -> Evaluation:
        """Return what there is so far."""
        return Evaluation(self.model, self.seed, tuple(self.rows))


def fingerprint(*paths: Path) -> str:
    """Return what tells files from others of the same name: names, sizes and times of change."""
    found = hashlib.sha256()
    for path in paths:
        files = [path] if path.is_file() else sorted(each for each in path.iterdir())
        for file in files:
            status = file.stat()
            found.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]


def _key(row: EvaluationRow) -> tuple[str, int, str]:
    return row.task, row.length, row.name


def _row(plain: dict[str, Any]) -> EvaluationRow:
    recalls = tuple(Recall(**_numbers(Recall, each)) for each in plain["recalls"])
    guesses = tuple(Guess(**_numbers(Guess, each)) for each in plain.get("guesses", ()))
    numbers = _numbers(EvaluationRow, plain)
    return EvaluationRow(**{**numbers, "recalls": recalls, "guesses": guesses})


def _numbers(kind: type, plain: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a row, with NaN again where a number is not known."""
    floats = {field.name for field in dataclasses.fields(kind) if field.type == "float"}
    return {
        name: float("nan") if value is None and name in floats else value
        for name, value in plain.items()
    }
