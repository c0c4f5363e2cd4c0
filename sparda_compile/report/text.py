"""Words, sizes and tables that more than one report shows: as text, and as HTML for notebooks."""

from __future__ import annotations

import html
import io
from typing import TYPE_CHECKING, Final

from rich.filesize import pick_unit_and_suffix

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sparda_compile.config import SpardaConfig

__all__ = [
    "columns",
    "format_bytes",
    "html_table",
    "selection_sentence",
    "speculation_sentence",
]

_UNITS: Final = ["B", "KiB", "MiB", "GiB", "TiB"]
# Wider than any row: what is no terminal gets whole lines.
_WIDTH: Final = 10_000


def format_bytes(num_bytes: int) -> str:
    """Return a size in the largest unit that leaves at least 1 of it: `1.5 MiB`."""
    unit, suffix = pick_unit_and_suffix(num_bytes, _UNITS, 1024)
    return f"{num_bytes / unit:.1f} {suffix}" if unit > 1 else f"{num_bytes} B"


def columns(head: Sequence[str], rows: Iterable[Sequence[str]], *, text: int) -> str:
    """Return a table as lines of text.

    Args:
        head: Names of the columns.
        rows: Cells, as many as names.
        text: The last so many columns hold text, the others numbers.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_edge=False)
    for i, name in enumerate(head):
        table.add_column(
            Text(name), justify="right" if i < len(head) - text else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(*map(Text, row))
    stream = io.StringIO()
    Console(file=stream, width=_WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as HTML, without any style: a notebook has its own."""
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    heading = f"<thead><tr>{names}</tr></thead>" if head else ""
    return f"<p>{html.escape(caption)}</p><table>{heading}<tbody>{body}</tbody></table>"


def selection_sentence(config: SpardaConfig, max_tokens: int | None = None) -> str:
    """Say from which length on decode steps leave blocks out.

    Args:
        config: What was built, or would be.
        max_tokens: Tokens that a sequence may hold; None says nothing of it.
    """
    first = config.selection_starts_at
    if config.mode == "dense":
        return "Nothing is selected: mode dense reads all blocks."
    if first is None:
        return "Nothing is selected: top_k=None reads all blocks."
    parts = f"{config.sink_blocks} + {config.local_blocks} + 1 + {config.top_k}"
    text = (
        f"Selection begins at {first:,} tokens: a step reads all blocks of a sequence up to "
        f"{first - 1:,} ({parts} blocks of {config.block_size})."
    )
    if max_tokens is not None and max_tokens < first:
        return f"{text} At most {max_tokens:,} are held here, so nothing is selected."
    name = config.prefill_selector
    if name not in (None, config.selector) and config.prefill != "dense":
        text += f" Tokens of a sparse prompt select by {name}, whose summary is kept beside."
    if config.prefill_candidates is not None and config.prefill != "dense":
        text += (
            f" They score the keys of {config.num_forced} + {config.num_proposed} blocks, which a "
            "look at all by one query for each KV head proposes."
        )
    return text


def speculation_sentence(speculated: int, left: int, most: int, machine: str) -> str:
    """Say how many layers begin their attention before their selection has ended.

    Args:
        speculated: Layers that do.
        left: Layers that do not, for the cost model sees no gain.
        most: Blocks that one of them predicts for a sequence and KV head, at most.
        machine: What was planned for.
    """
    if not speculated:
        return f"Nothing is predicted: on {machine} no layer is expected to gain by it."
    text = f"Layers that attend to up to {most} predicted blocks while they select: {speculated}."
    return f"{text} {left} would gain nothing on {machine}, and do not." if left else text
