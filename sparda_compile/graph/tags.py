"""What this library writes on nodes and graph modules: every key of `meta`, with its type.

LAYER    node            layer that an op of ours is for, -1 for the whole program
SITE     node            the attention that a node stands for
ORDER    node            place of an op that uses state in the program as it was written
HINTS    node            whose blocks these ids guess: names of hints, each with its layer
HINT     node            the hint whose guess a node leads to, plans, fetches or awaits
FACTS    graph module    what holds of the graph
JOINED   graph module    joined weight -> the weights that it joins, by rows
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, overload

if TYPE_CHECKING:
    from sparda_compile.graph.site import AttentionSite

__all__ = ["FACTS", "HINT", "HINTS", "JOINED", "LAYER", "ORDER", "SITE", "Tag"]

T = TypeVar("T")
D = TypeVar("D")


class Tag(Generic[T]):
    """One key of `meta`.

    Args:
        key: As it stands in `meta`.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def on(self, where: Any) -> bool:
        """Whether a node or graph module has it."""
        return self.key in where.meta

    def of(self, where: Any) -> T:
        """Return its value; KeyError if there is none."""
        value: T = where.meta[self.key]
        return value

    @overload
    def get(self, where: Any) -> T | None: ...

    @overload
    def get(self, where: Any, default: D) -> T | D: ...

    def get(self, where: Any, default: Any = None) -> Any:
        """Return its value, or the default."""
        return where.meta.get(self.key, default)

    def put(self, where: Any, value: T) -> None:
        """Write it."""
        where.meta[self.key] = value

    def drop(self, where: Any) -> None:
        """Take it away, if it is there."""
        where.meta.pop(self.key, None)


LAYER: Final[Tag[int]] = Tag("sparda_layer")
SITE: Final[Tag[AttentionSite]] = Tag("sparda")
ORDER: Final[Tag[int]] = Tag("sparda_order")
HINTS: Final[Tag[list[tuple[str, int]]]] = Tag("sparda_hint_for")
HINT: Final[Tag[str]] = Tag("sparda_hint")
FACTS: Final[Tag[frozenset[Any]]] = Tag("sparda_facts")
JOINED: Final[Tag[dict[str, tuple[str, ...]]]] = Tag("sparda_joined")
