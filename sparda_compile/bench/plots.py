"""Decode results as a plot: time of a step, and tokens per second, against overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sparda_compile.errors import BackendUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["check_matplotlib", "write_plot"]

_DRAWN: Final = ("scheduled", "inline", "resident", "dense", "body")


def check_matplotlib() -> None:
    """Raise BackendUnavailableError if plots cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise BackendUnavailableError(
            "a plot needs matplotlib, which is not installed; install sparda-compile[plot], or "
            "leave --plot out."
        ) from error


def write_plot(results: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw decode results into a file.

    Args:
        results: Of one shape, one for each batch size; those without times are left out.
        path: File to write; its ending says the format, such as .png or .svg.

    Raises:
        BackendUnavailableError: If matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    measured = [result for result in results if result["by_overlap"]]
    figure = Figure(figsize=(4.5 * (len(measured) + 1), 4.0), layout="constrained")
    panels = figure.subplots(1, len(measured) + 1, squeeze=False)[0]
    for panel, result in zip(panels, measured, strict=False):
        _draw_times(panel, result)
    rates = panels[-1]
    for result in measured:
        overlaps = _overlaps(result)
        values = [row["tokens_per_s"] for row in result["by_overlap"].values()]
        rates.plot(overlaps, values, marker="o", label=f"batch {result['batch_size']}")
    rates.set(title="scheduled", xlabel="overlap of steps", ylabel="tokens/s", ylim=(0, None))
    if measured:
        rates.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def _draw_times(panel: Any, result: Mapping[str, Any]) -> None:
    rows = list(result["by_overlap"].values())
    overlaps = _overlaps(result)
    for number, name in enumerate(_DRAWN):
        if all(name in row for row in rows):
            values = [row[name]["median"] / 1e3 for row in rows]
            panel.plot(overlaps, values, marker="o", color=f"C{number}", label=name)
    if all("floor_us" in row for row in rows):
        floor = [row["floor_us"] / 1e3 for row in rows]
        panel.plot(overlaps, floor, "--", color="black", label="floor")
    title = f"batch {result['batch_size']}, {result['max_tokens'] // 1024}K tokens"
    panel.set(title=title, xlabel="overlap of steps", ylabel="ms per step", ylim=(0, None))
    panel.legend(fontsize="small")


def _overlaps(result: Mapping[str, Any]) -> list[float]:
    return [float(overlap) for overlap in result["by_overlap"]]
