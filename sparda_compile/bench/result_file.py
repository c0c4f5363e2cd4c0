"""Files that keep what was measured.

A result is written as soon as it is there, and measurements of the same environment that a file
holds already are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparda_compile.environment import kept_result, write_result

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ResultFile"]


class ResultFile:
    """A JSON file of results, one for each value of `key`; rewritten whenever one is added.

    Args:
        path: The file. What it holds is kept if it was measured in this environment; the date may
            differ.
        head: Fields beside the results.
        key: Field that tells results apart.
        commit: Of this package, where it is not a git checkout.

    Attributes:
        results: What is there, by key.
    """

    def __init__(
        self, path: Path, head: dict[str, Any], key: str, commit: str | None = None
    ) -> None:
        self.path = path
        self.head = head
        self.key = key
        self.commit = commit
        self.results: list[dict[str, Any]] = self._kept()

    def _kept(self) -> list[dict[str, Any]]:
        found = kept_result(self.path, self.head, self.commit) or {}
        return list(found.get("results", []))

    def has(self, value: object) -> bool:
        """Return whether there is a result of this key with everything in it."""
        return any(r[self.key] == value and not r.get("unfinished") for r in self.results)

    def get(self, value: object) -> dict[str, Any] | None:
        """Return the result of this key, whole or not."""
        return next((r for r in self.results if r[self.key] == value), None)

    def save(self, result: dict[str, Any]) -> None:
        """Add a result, in place of one with the same key, and write the file."""
        others = [r for r in self.results if r[self.key] != result[self.key]]
        self.results = sorted([*others, result], key=lambda r: r[self.key])
        self.write()

    def write(self) -> None:
        """Write the file as it is now."""
        write_result(self.path, self.content(), self.commit)

    def content(self) -> dict[str, Any]:
        """Return the head and the results."""
        return {**self.head, "results": self.results}
