"""Results of `sparda bench prr` as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sparda_compile.bench.prr import SUMMARY
from sparda_compile.bench.show import make_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

__all__ = ["print_prr"]

_NOTE: Final = """\
Microseconds of one layer's selection and attention, medians. torch: its operators, the faster of \
SDPA and FlexAttention; eager: SDPA without a CUDA graph. speculate: with so many times the \
selected blocks predicted, which hold so much of them, and the next prediction beside it. /torch, \
/query: how many times as long those take."""
_ALL_NOTE: Final = """\
us: median of a step of a layer. floor: bytes at the rate of a copy. coverage: share of the \
selected blocks that were predicted. /torch, /query: how many times as long those take."""


def print_prr(results: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print all parts that there are, and what was left out."""
    parts = {result["part"]: result for result in results}
    layers = [result for result in results if "by_overlap" in result]
    if layers:
        _print_layers(layers, console)
    for result in layers:
        _print_programs(result, console)
    if "attention" in parts:
        _print_attention(parts["attention"], console)
    for name, result in parts.items():
        if name.startswith("selection"):
            _print_selection(name, result, console)
        if name.startswith("prediction"):
            _print_prediction(name, result, console)
    if SUMMARY in parts:
        _print_bars(parts[SUMMARY], console)


def _print_layers(layers: Sequence[Mapping[str, Any]], console: Console) -> None:
    times = ("eager", "torch", "query", "speculate")
    names = ("layer", *times, "budget", "coverage", "/torch", "/query")
    table = make_table("From torch to speculation", names, 1)
    for result in layers:
        for found in list(result["by_overlap"].values())[:1]:
            line, rows = found["headline"], found["programs"]
            each = [rows[found["best_torch"]]["median"], rows["query"]["median"], line["median"]]
            table.add_row(
                result["part"],
                *(f"{us:.1f}" for us in (found["ladder"]["torch_sdpa_without_graph"], *each)),
                f"{line['budget']:g}",
                f"{line['coverage']:.3f}",
                f"{line['over_torch']:.2f}",
                f"{line['over_query']:.2f}",
            )
    console.print(table)
    console.print(_NOTE, markup=False)
    columns = ("ablation", "overlap", "recompute", "kernels", "repair", "ema")
    table = make_table("Best of torch over each step", columns, 1)
    for result in layers:
        for overlap, found in result["by_overlap"].items():
            row = found["ablation"]
            ratios = (row[name] for name in ("recompute", "kernels_alone", "repair", "ema"))
            table.add_row(result["part"], overlap, *(f"{ratio:.2f}" for ratio in ratios))
    paper = next((f["ablation"]["paper"] for r in layers for f in r["by_overlap"].values()), None)
    if paper is not None:
        stated = [f"{paper[name]:.2f}" for name in ("recompute", "repair", "ema")]
        table.add_row("the paper", "", stated[0], "-", *stated[1:])
    console.print(table)


def _print_programs(result: Mapping[str, Any], console: Console) -> None:
    for overlap, found in result["by_overlap"].items():
        columns = ("program", "us", "floor", "coverage", "/torch", "/query")
        table = make_table(f"{result['part']}, overlap {overlap}", columns, 1)
        for name, row in found["programs"].items():
            coverage = f"{row['coverage']:.3f}" if "coverage" in row else "-"
            times = (f"{row['median']:.2f}", f"{row['floor_us']:.2f}", coverage)
            table.add_row(name, *times, f"{row['over_torch']:.2f}", f"{row['over_query']:.2f}")
        console.print(table)
        _print_skipped(result["part"], found["skipped"], console)
    if result["by_overlap"]:
        console.print(_ALL_NOTE, markup=False)
    _print_skipped(result["part"], result["skipped"], console)


def _print_attention(result: Mapping[str, Any], console: Console) -> None:
    names = ("ours", "sdpa", "gather_sdpa", "flashinfer")
    columns = ("block", "tokens", *names, "floor", "flashinfer/", "paper")
    title = f"Attention alone, {result['tokens']} tokens, us"
    table = make_table(title, columns, 0)
    for cell in result["cells"]:
        times = (f"{cell[name]['median']:.1f}" if name in cell else "-" for name in names)
        ratios = (cell.get("over_flashinfer"), cell.get("paper"))
        table.add_row(
            str(cell["block"]),
            str(cell["budget"]),
            *times,
            f"{cell['floor_us']:.1f}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        )
    console.print(table)
    for name, row in result["ratios"].items():
        text = f"{name}: mean {row['mean']:.2f}, best {row['best']:.2f}, least {row['least']:.2f}."
        console.print(text, markup=False)
    skipped: dict[str, str] = {}
    for cell in result["cells"]:
        skipped |= cell["skipped"]
    _print_skipped("attention", skipped, console)


def _print_selection(name: str, result: Mapping[str, Any], console: Console) -> None:
    columns = ("tokens", "score", "select", "both", "torch", "floor", "paper")
    table = make_table(f"{name}, us", columns, 0)
    for tokens, row in result["by_tokens"].items():
        times = (f"{row[key]['median']:.1f}" for key in ("score", "select", "both", "torch"))
        paper = f"{row['paper_us']:.1f}" if "paper_us" in row else "-"
        table.add_row(tokens, *times, f"{row['floor_us']:.1f}", paper)
    console.print(table)


def _print_prediction(name: str, result: Mapping[str, Any], console: Console) -> None:
    columns = ("tokens", "update", "predict", "paper", "calibrate", "paper")
    table = make_table(f"{name}, us", columns, 0)
    for tokens, row in result["by_tokens"].items():
        update, predict, calibrate = (
            f"{row[key]['median']:.1f}" for key in ("update", "predict", "calibrate")
        )
        paper = row.get("paper_calibration_us", {}).get("all", "-")
        table.add_row(tokens, update, predict, f"{result['paper_us']:.0f}", calibrate, f"{paper}")
    console.print(table)


def _print_bars(result: Mapping[str, Any], console: Console) -> None:
    table = make_table(f"Bars, over {result['shapes']} layers", ("", "found", "bar", "passed"), 1)
    for name, value in result["found"].items():
        passed = "yes" if result["passed"][name] else "NO"
        table.add_row(name, f"{value:.3f}", f"{result['bars'][name]:g}", passed)
    console.print(table)


def _print_skipped(what: str, skipped: Mapping[str, str], console: Console) -> None:
    for name, reason in skipped.items():
        console.print(f"{what}: {name} is left out: {reason}.", markup=False)
