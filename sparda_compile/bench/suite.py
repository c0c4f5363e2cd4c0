"""Everything in one process, the most important part first, within a time.

A part that would not end in time is left out, and one that fails is reported; the others still run.
Each part writes its result itself, so a process that is stopped loses the part that it is in.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.bench.memory import free_everything

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["PARTS", "WITH_BASELINES", "Part", "run_parts"]

# What is measured, shape, its size, minutes on one H200, the most important first. A size is the
# sequences of `decode`, the tokens of a prompt of `prefill`, and those of the past of `turns`.
PARTS: Final = (
    ("decode", "8b", 1, 6.0),
    ("prefill", "8b", 1024, 4.0),
    ("prefill", "8b", 131072, 7.0),
    ("turns", "8b", 131072, 5.0),
    ("decode", "8b", 16, 5.5),
    ("decode", "8b", 4, 4.5),
    ("decode", "8b", 8, 5.0),
    ("prefill", "8b", 32768, 4.0),
    ("prefill", "8b", 524288, 6.0),
    ("prefill", "8b", 1048576, 8.0),
    ("prefill", "8b", 4096, 3.0),
    ("turns", "8b", 524288, 7.0),
    ("decode", "8b-8kv", 1, 5.0),
    ("decode", "8b-8kv", 4, 5.5),
    ("prefill", "8b-8kv", 131072, 8.0),
)
# Shape and batch size of the decode that is measured beside transformers' caches.
WITH_BASELINES: Final = ("8b", 1)


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the suite.

    Attributes:
        name: For the report.
        minutes: What it takes, roughly; it is not begun with less time than that.
        is_done: Whether its result is there already.
        run: Measures and writes.
    """

    name: str
    minutes: float
    is_done: Callable[[], bool]
    run: Callable[[], object]


def run_parts(
    parts: Sequence[Part],
    minutes: float,
    say: Callable[[str], None],
    save: Callable[[list[dict[str, Any]]], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Run the parts in order.

    Args:
        parts: The most important first.
        minutes: Time for all of them.
        say: Told what is going on.
        save: Given what became of the parts so far, after each.
        clock: Seconds.

    Returns:
        Name, status (`done`, `kept`, `left out`, `failed`), seconds and reason of each part.
    """
    end = clock() + 60 * minutes
    found: list[dict[str, Any]] = []
    for part in parts:
        found.append({"name": part.name, **_run(part, end, say, clock)})
        save(found)
    return found


def _run(
    part: Part, end: float, say: Callable[[str], None], clock: Callable[[], float]
) -> dict[str, Any]:
    if part.is_done():
        return {"status": "kept", "reason": "its result was there already"}
    begin = clock()
    left = (end - begin) / 60
    if left < part.minutes:
        reason = f"it takes about {part.minutes:g} minutes, and {max(left, 0):.1f} are left"
        say(f"{part.name} is left out: {reason}")
        return {"status": "left out", "reason": reason}
    say(part.name)
    failure = _failure(part, say)
    free_everything()
    seconds = round(clock() - begin, 1)
    if failure is None:
        return {"status": "done", "seconds": seconds}
    say(f"{part.name} failed: {failure}")
    return {"status": "failed", "seconds": seconds, "reason": failure}


def _failure(part: Part, say: Callable[[str], None]) -> str | None:
    """Run a part; return what went wrong, as text: the error itself would hold its memory."""
    try:
        part.run()
    except Exception as error:  # noqa: BLE001 - reported, and no reason to lose the other parts
        say(traceback.format_exc())
        return f"{type(error).__name__}: {error}"
    return None
