"""Speed against quality of formats: results of decode joined with perplexities on text.

    a decode file    one format, selector and number of blocks: tokens per second by batch, overlap
    a text file      perplexity by format, selector and share of the blocks that a step reads

A point is a format, a selector and a share that both have. Shares are of different lengths, a
benchmark's and a text's, so two are the same if they are no further apart than a fiftieth of the
blocks.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.bench.plots import check_matplotlib
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = ["TradeoffPoint", "draw_tradeoff", "join", "read_result"]

_NEAR: Final = 0.02
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c8c8c", "#56b4e9", "#e69f00")


@dataclasses.dataclass(frozen=True)
class TradeoffPoint:
    """One format with one budget.

    Attributes:
        kv_format: How full blocks are written.
        selector: Of both. Which blocks steps read is that of the benchmark; what scoring takes is
            in the speed.
        read: Share of the blocks that a step reads, on the text.
        tokens_per_s: Of all sequences together.
        perplexity: Of the text.
        ratio: Over that of the model itself.
        kl: Mean divergence from the model itself, nats.
    """

    kv_format: str
    selector: str
    read: float
    tokens_per_s: float
    perplexity: float
    ratio: float
    kl: float


def read_result(path: Path, *names: str) -> dict[str, Any]:
    """Return what a result file holds.

    Args:
        path: The file.
        *names: Kinds of files, one of which it has to be.

    Raises:
        ConfigError: If it is none of these.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("name") not in names:
        raise ConfigError(f"{path} is no result of the kind {' or '.join(names)}; give another.")
    return content


def join(
    decoded: Iterable[Mapping[str, Any]], text: Mapping[str, Any], batch_size: int, overlap: float
) -> list[TradeoffPoint]:
    """Return the points that both have.

    Args:
        decoded: What decode files hold, each of a format and a number of blocks.
        text: What the text file holds.
        batch_size: Sequences of the benchmark.
        overlap: Of the benchmark.

    Raises:
        ConfigError: If there is no point; the text says what there is.
    """
    speeds = [
        (content.get("kv_format", "model"), _selector(content), _share(content), rate)
        for content in decoded
        for rate in _rates(content, batch_size, overlap)
    ]
    rows = [row for row in text["rows"] if row["task"] == "perplexity" and row["mode"] == "query"]
    found = [
        TradeoffPoint(
            kv_format=row["kv_format"],
            selector=row["selector"],
            read=row["budget"],
            tokens_per_s=rate,
            perplexity=row["perplexity"]["value"],
            ratio=row["ratio"]["value"],
            kl=row["kl"]["value"],
        )
        for row in rows
        for name, selector, share, rate in speeds
        if (name, selector) == (row["kv_format"], row["selector"])
        and abs(share - row["budget"]) <= _NEAR
    ]
    if not found:
        measured = _words(speed[:3] for speed in speeds)
        wanted = _words((row["kv_format"], row["selector"], row["budget"]) for row in rows)
        raise ConfigError(
            f"no format has both a speed and a perplexity by one selector and of one share. With "
            f"{batch_size} sequences at an overlap of {overlap:g} speeds are there of {measured}; "
            f"perplexities of {wanted}. Measure `sparda bench decode --selector --top-k` with "
            "these, or name another --batch or --overlap."
        )
    return sorted(found, key=lambda point: (point.selector, point.read, point.kv_format))


def _rates(content: Mapping[str, Any], batch_size: int, overlap: float) -> list[float]:
    """Return the tokens per second of a file: one, or none if it was not measured."""
    return [
        row["tokens_per_s"]
        for result in content["results"]
        if result["batch_size"] == batch_size
        for key, row in result["by_overlap"].items()
        if float(key) == overlap and "tokens_per_s" in row
    ]


def _share(content: Mapping[str, Any]) -> float:
    """Return the share of the blocks that a step of a benchmark reads."""
    config = SpardaConfig(top_k=content.get("top_k", SpardaConfig.top_k))
    num_blocks = int(content["max_tokens"]) // config.block_size
    return config.num_selected(num_blocks) / num_blocks


def _selector(content: Mapping[str, Any]) -> str:
    return str(content.get("selector", SpardaConfig.selector))


def _words(found: Iterable[tuple[str, str, float]]) -> str:
    words = {f"{name} by {selector}, {100 * share:.0f}%" for name, selector, share in found}
    return "; ".join(sorted(words)) or "nothing"


def draw_tradeoff(points: Sequence[TradeoffPoint], path: Path, title: str) -> Path:
    """Draw tokens per second against perplexity: a line a budget and selector, a point a format.

    Args:
        points: At least one.
        path: File to write; its ending says the format, such as .png or .svg.
        title: Of the plot.

    Raises:
        BackendUnavailableError: If matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    panel: Any = figure.subplots()
    panel.set(title=title, xlabel="tokens per second", ylabel="perplexity")
    budgets = list(dict.fromkeys((p.selector, round(p.read, 2)) for p in points))
    for number, (selector, read) in enumerate(budgets):
        mine = [p for p in points if (p.selector, round(p.read, 2)) == (selector, read)]
        mine.sort(key=lambda point: point.tokens_per_s)
        xs, ys = [p.tokens_per_s for p in mine], [p.perplexity for p in mine]
        colour = _COLOURS[number % len(_COLOURS)]
        label = f"{selector}, {100 * read:.0f}% of the blocks"
        panel.plot(xs, ys, marker="o", ms=5, lw=1.2, color=colour, label=label)
        for point in mine:
            panel.annotate(
                point.kv_format,
                (point.tokens_per_s, point.perplexity),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
            )
    panel.grid(alpha=0.25)
    panel.legend(fontsize=9)
    figure.savefig(path, dpi=120)
    return path
