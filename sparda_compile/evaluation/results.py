"""A JSON file of an evaluation, written part by part, from which it goes on.

A part is one task at one length. What a file holds is kept if it was measured in this environment
and with these settings, the date aside; so an evaluation that was stopped loses the part that it
was in.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from sparda_compile.environment import kept_result, write_result
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
    """

    def __init__(self, path: Path | None, model: str, seed: int, settings: dict[str, Any]) -> None:
        self.path = path
        self.model = model
        self.seed = seed
        self.settings = settings
        self.rows: list[EvaluationRow] = []
        head = {"model": model, "seed": seed, "settings": settings}
        found = kept_result(path, head) if path is not None else None
        rows = found.get("rows") if found else None
        self._kept = [_row(plain) for plain in rows] if isinstance(rows, list) else []

    def keep(self, task: str, length: int, names: Iterable[str]) -> bool:
        """Take over a part that the file has: a row for each configuration, and no other."""
        rows = [row for row in self._kept if (row.task, row.length) == (task, length)]
        if [row.name for row in rows] != list(names):
            return False
        self.rows += rows
        return True

    def save(self, rows: Sequence[EvaluationRow]) -> None:
        """Add a part and write the file."""
        self.rows += rows
        if self.path is not None:
            found = {**self.evaluation().to_dict(), "settings": self.settings}
            write_result(self.path, found)

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
