"""Results as plots, as wide as a page of text.

Decode: time of a step, and tokens per second, against overlap.

    batch 1   batch 4   batch 8   batch 16      milliseconds of a step, on one scale
    tokens per second     what the lines are

Prompts: time to the first token against length, both by powers.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.bench.prefill import best_baseline, seconds_of
from sparda_compile.bench.shapes import SHAPES
from sparda_compile.environment import describe
from sparda_compile.errors import BackendUnavailableError, ConfigError
from sparda_compile.files import check_writable, replacing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["check_matplotlib", "write_plot", "write_prefill_plot"]

# Name in the results -> colour that the colour-blind can tell apart, mark, and what it is.
_LINES: Final = {
    "inline": ("#d55e00", "s", "the same kernels, every copy in line"),
    "scheduled": ("#0072b2", "o", "KV cache in CPU memory, copies under compute"),
    "resident": ("#009e73", "^", "every block on the device, no copies"),
    "dense": ("#cc79a7", "D", "every block on the device, and all are read"),
    "body": ("#8c8c8c", "v", "the model without its attention"),
}
# The same for prompts.
_PROMPT_LINES: Final = {
    "sparse_forecast": ("#0072b2", "o", "sparse prefill by the Forecast, KV cache in CPU memory"),
    "sparse_query": ("#009e73", "^", "sparse prefill by the query, KV cache in CPU memory"),
    "sparse_resident": ("#56b4e9", "v", "sparse prefill by the Forecast, KV cache on the GPU"),
    "dense": ("#cc79a7", "D", "dense prefill, KV cache in CPU memory"),
    "transformers": ("#d55e00", "s", "transformers' dynamic cache on the GPU, its faster SDPA"),
}
_BY_LAW: Final = "hollow, dashed: not measured, by the law of the same program's shorter prompts"
_FLOOR: Final = "the longer of resident and the bytes at the rate of one large copy"
_CAPTION: Final = (
    "Overlap: of the blocks that a step picks by score, the share that the step before picked too. "
    "The others are copied from CPU memory. Each point is the median of its steps."
)
_RATE_COLOURS: Final = ("#56b4e9", "#0072b2", "#004c78", "#001d2e")
_COLUMNS: Final = 4
# Inches; at 100 dots each the page is 900 wide. Twice as many keep it sharp on fine screens.
_WIDTH: Final = 9.0
_DPI: Final = 200


def check_matplotlib() -> None:
    """Raise BackendUnavailableError if plots cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise BackendUnavailableError(
            "a plot needs matplotlib, which is not installed; install sparda-compile[plot], or "
            "leave --plot out."
        ) from error


def write_plot(content: Mapping[str, Any], path: str | Path) -> Path:
    """Draw decode results into a file.

    Args:
        content: What a decode file holds: `shape`, `max_tokens`, `results` of one batch size each,
            and `environment`; without that it is the present one. Results without times are left
            out.
        path: File to write; its ending says the format, such as .png or .svg.

    Raises:
        BackendUnavailableError: If matplotlib is not installed.
        ConfigError: If the file cannot be written, or its ending is no format; nothing of it is
            left then.
    """
    target = _checked(path)
    from matplotlib.figure import Figure

    measured = [result for result in content["results"] if result["by_overlap"]]
    num_columns = min(max(len(measured), 1), _COLUMNS)
    num_rows = -(-len(measured) // num_columns)
    figure = Figure(figsize=(_WIDTH, 2.6 * num_rows + 3.3), layout="constrained")
    figure.suptitle(_title(content), fontsize=11)
    if measured:
        parts: Any = figure.subfigures(2, 1, height_ratios=(2.6 * num_rows, 2.5))
        _draw_times(parts[0], measured, num_rows, num_columns)
        _draw_rates(parts[1], measured)
    else:
        figure.text(0.5, 0.4, "Nothing was measured.", ha="center")
    return _save(figure, target)


def write_prefill_plot(content: Mapping[str, Any], path: str | Path) -> Path:
    """Draw the time to the first token of prompts into a file.

    Args:
        content: What a prefill file holds: `shape`, `results` of one length each, and
            `environment`; without that it is the present one.
        path: File to write; its ending says the format, such as .png or .svg.

    Raises:
        BackendUnavailableError: If matplotlib is not installed.
        ConfigError: If the file cannot be written, or its ending is no format; nothing of it is
            left then.
    """
    target = _checked(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 6.0), layout="constrained")
    figure.suptitle(f"Time to the first token of {_model(content)}", fontsize=11)
    panel: Any = figure.subplots()
    results = sorted(content["results"], key=lambda result: int(result["tokens"]))
    for name in _PROMPT_LINES:
        _draw_prompts(panel, results, name)
    lengths = [result["tokens"] for result in results]
    panel.set(xscale="log", yscale="log")
    panel.set_xticks(lengths, [_length(n) for n in lengths])
    panel.minorticks_off()
    panel.set_xlabel("tokens of the prompt", fontsize=10)
    panel.set_ylabel("seconds to the first token", fontsize=10)
    panel.tick_params(labelsize=9)
    panel.grid(alpha=0.25)
    if panel.lines:
        panel.legend(fontsize=9, title=_BY_LAW, title_fontsize=9, loc="upper left")
    else:
        panel.text(0.5, 0.5, "Nothing was measured.", ha="center", transform=panel.transAxes)
    return _save(figure, target)


def _draw_prompts(panel: Any, results: Sequence[Mapping[str, Any]], name: str) -> None:
    """Draw a program's line: what was measured, and dashed from there on what a law says."""
    colour, mark, what = _PROMPT_LINES[name]
    points = []
    for result in results:
        program = best_baseline(result) if name == "transformers" else name
        seconds, is_law = seconds_of(result, program) if program else (None, False)
        if seconds is not None:
            points.append((result["tokens"], seconds, is_law))
    measured = [(n, s) for n, s, is_law in points if not is_law]
    by_law = [(n, s) for n, s, is_law in points if is_law]
    style = {"color": colour, "marker": mark, "ms": 5, "lw": 1.4}
    if measured:
        panel.plot(*zip(*measured, strict=True), label=f"{name}: {what}", **style)
    if by_law:
        dashed = [*measured[-1:], *by_law]
        panel.plot(*zip(*dashed, strict=True), ls="--", mfc="white", zorder=1, **style)


def _checked(path: str | Path) -> Path:
    """Return the file to write, if it can be and its ending is a format."""
    check_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    target = check_writable(path)
    ending = target.suffix.removeprefix(".")
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if ending not in known:
        raise ConfigError(
            f"{target} has the ending {target.suffix!r}, which says no format of a plot; use one "
            f"of {', '.join(known)}."
        )
    return target


def _save(figure: Any, target: Path) -> Path:
    with replacing(target) as partial:
        figure.savefig(partial, dpi=_DPI, format=target.suffix.removeprefix("."))
    return target


def _title(content: Mapping[str, Any]) -> str:
    return f"Decode of {_model(content, content['max_tokens'])}"


def _model(content: Mapping[str, Any], tokens: int | None = None) -> str:
    """Return two lines: the model, and the length of its texts, where and when it ran."""
    shape = content["shape"]
    sizes = SHAPES.get(shape)
    model = f"Llama {shape}"
    if sizes is not None:
        model += f" ({sizes.num_layers} layers, {sizes.num_groups} KV heads, random weights)"
    environment = content.get("environment") or describe()
    where = environment["gpu"] or "a CPU"
    length = "" if tokens is None else f"{_length(tokens)} tokens a sequence, "
    return f"{model}\n{length}{where}, {environment['date']}"


def _length(tokens: int) -> str:
    """Return a length as people say it."""
    if tokens >= 1 << 20 and not tokens % (1 << 20):
        return f"{tokens >> 20}M"
    return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


def _draw_times(part: Any, measured: Sequence[Mapping[str, Any]], rows: int, columns: int) -> None:
    """Draw the times of a step, one panel for each batch size, all on one scale."""
    grid = part.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for panel, result in zip(panels, measured, strict=False):
        by_overlap = list(result["by_overlap"].values())
        for name in _lines(measured):
            colour, mark, _ = _LINES[name]
            if all(name in row for row in by_overlap):
                times = [row[name]["median"] / 1e3 for row in by_overlap]
                panel.plot(_overlaps(result), times, marker=mark, color=colour, ms=4, lw=1.4)
        if all("floor_us" in row for row in by_overlap):
            floor = [row["floor_us"] / 1e3 for row in by_overlap]
            panel.plot(_overlaps(result), floor, "--", color="black", lw=1.2)
        many = "" if result["batch_size"] == 1 else "s"
        panel.set_title(f"{result['batch_size']} sequence{many}", fontsize=10)
        panel.tick_params(labelsize=9)
        panel.grid(alpha=0.25)
    panels[0].set(ylim=(0, None))
    for panel in panels[len(measured) :]:
        panel.set_axis_off()
    part.supxlabel("overlap of one step with the next", fontsize=10)
    part.supylabel("milliseconds of a step", fontsize=10)


def _draw_rates(part: Any, measured: Sequence[Mapping[str, Any]]) -> None:
    """Draw the tokens per second, and beside them what all lines are."""
    from matplotlib.lines import Line2D

    rates, words = part.subplots(1, 2, width_ratios=(2, 3))
    for number, result in enumerate(measured):
        values = [row["tokens_per_s"] for row in result["by_overlap"].values()]
        colour = _RATE_COLOURS[number % len(_RATE_COLOURS)]
        label = str(result["batch_size"])
        rates.plot(_overlaps(result), values, marker="o", ms=4, lw=1.4, color=colour, label=label)
    rates.set_title("scheduled, all sequences together", fontsize=10)
    rates.set_xlabel("overlap", fontsize=10)
    rates.set_ylabel("tokens per second", fontsize=10)
    rates.set(ylim=(0, None))
    rates.tick_params(labelsize=9)
    rates.grid(alpha=0.25)
    rates.legend(title="sequences", fontsize=9, title_fontsize=9)
    words.set_axis_off()
    lines = [
        Line2D([], [], color=_LINES[name][0], marker=_LINES[name][1], ms=5, lw=1.4)
        for name in _lines(measured)
    ]
    names = [f"{name}: {_LINES[name][2]}" for name in _lines(measured)]
    floor = Line2D([], [], color="black", ls="--", lw=1.2)
    names = [textwrap.fill(name, 62) for name in (*names, f"floor: {_FLOOR}")]
    words.legend([*lines, floor], names, loc="upper left", fontsize=9, frameon=False)
    caption = textwrap.fill(_CAPTION, 74)
    words.text(0.02, 0.02, caption, fontsize=9, va="bottom", transform=words.transAxes)


def _lines(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the lines that any result has at every overlap."""
    rows = [list(result["by_overlap"].values()) for result in measured]
    return [name for name in _LINES if any(all(name in row for row in each) for each in rows)]


def _overlaps(result: Mapping[str, Any]) -> list[float]:
    return [float(overlap) for overlap in result["by_overlap"]]
