"""Results as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparda_compile.bench.decode import VARIANTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console

    from sparda_compile.machine import Machine

__all__ = ["print_budget", "print_decode", "print_kernels", "print_machine", "print_parts"]

_DECODE_NOTE = """\
Milliseconds of one step, medians. overlap: share of scored blocks that a step has in common with \
the one before. floor: the resident step, or the time of the link if that is longer. MB: bytes \
that a scheduled step copies to the device."""


def print_decode(results: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print decode results: a row for each batch size and overlap, and what was left out."""
    names = [n for n in VARIANTS if any(n in row for r in results for row in _rows(r).values())]
    ratios = ("sched/\nbody", "inline/\nsched", "sched/\nfloor")
    columns = ("batch", "overlap", *names, *ratios, "tokens/s", "MB")
    table = _table("", columns, 0)
    for result in results:
        for overlap, row in _rows(result).items():
            table.add_row(
                str(result["batch_size"]),
                overlap,
                *(_ms(row[name]["median"]) if name in row else "-" for name in names),
                *(
                    _ratio(row.get(name))
                    for name in ("scheduled_over_body", "inline_over_scheduled",
                                 "scheduled_over_floor")
                ),
                f"{row['tokens_per_s']:.0f}",
                f"{row['scheduled']['h2d_bytes'] / 1e6:.1f}",
            )  # fmt: skip
    console.print(table)
    console.print(_DECODE_NOTE, markup=False)
    for result in results:
        batch = f"batch {result['batch_size']}"
        _print_skipped(batch, result.get("skipped", {}), console)
        if "baselines" in result:
            _print_baselines(batch, result["baselines"], console)


def print_budget(results: Iterable[Mapping[str, Any]], console: Console) -> None:
    """Print budgets: batch sizes, what limited them, and throughput."""
    columns = ("budget", "overlap", "side", "batch", "limited by", "device GiB", "CPU GiB", "ms",
               "tokens/s", "ratio")  # fmt: skip
    table = _table("", columns, 0)
    for result in results:
        for overlap, row in (result["by_overlap"] or {"-": {}}).items():
            for side in ("resident", "scheduled"):
                place, found = result[side], row.get(side)
                table.add_row(
                    f"{result['budget_gib']:g} GiB",
                    overlap,
                    side,
                    str(place["batch_size"]),
                    place["limited_by"],
                    f"{place['device_gib']:.1f}",
                    f"{place['host_gib']:.1f}",
                    _ms(found["median"]) if found else "-",
                    f"{found['tokens_per_s']:.0f}" if found else "-",
                    _ratio(row.get("throughput_ratio")) if side == "scheduled" else "",
                )
        if "skipped" in result:
            reason = f"{result['budget_gib']:g} GiB is left out: {result['skipped']}."
            console.print(reason, markup=False)
    console.print(table)


def print_kernels(result: Mapping[str, Any], console: Console) -> None:
    """Print kernels: time, floor, and what else could do the same."""
    console.print(f"Device copy: {result['copy']['gbps']:.0f} GB/s.", markup=False)
    gather = result["gather"]
    table = _table("Gather of 8 MiB from pinned memory", ("programs", "us", "GB/s", "of memcpy"), 0)
    for programs, row in gather["by_programs"].items():
        cells = (f"{row['median']:.1f}", f"{row['gbps']:.1f}", f"{row['of_memcpy']:.3f}")
        table.add_row(str(programs), *cells)
    memcpy = gather["memcpy"]
    table.add_row("memcpy", f"{memcpy['median']:.1f}", f"{memcpy['gbps']:.1f}", "1")
    console.print(table)
    columns = ("kernel", "us", "floor us", "over floor", "SDPA us", "FlexAttention us")
    table = _table("At 128K tokens, 96 blocks selected", columns, 1)
    for name, row in result.items():
        if name.startswith("miss_list"):
            us, others = row["chain"]["median"], ["-", "-"]
        elif name.startswith("attention"):
            us = row["by_blocks_per_split"][row["blocks_per_split"]]["median"]
            others = [
                f"{row[other]['median']:.1f}" if other in row else "-"
                for other in ("sdpa_gathered", "flex_gathered")
            ]
        else:
            continue
        floor = row["floor_us"]
        table.add_row(name, f"{us:.1f}", f"{floor:.2f}", _ratio(us / floor), *others)
    console.print(table)
    for batch, found in result["beside"].items():
        heads = ("copied by", "alone us", "beside products us", "hidden", "held up")
        table = _table(f"Beside matrix products, batch {batch[1:]}", heads, 1)
        table.add_row("nobody", "-", f"{found['compute_us']:g}", "-", "-")
        for name, row in found["by_copy"].items():
            keys = ("copy_us", "both_us", "hidden", "held_up")
            table.add_row(name, *(f"{row[key]:g}" for key in keys))
        console.print(table)


def print_machine(machine: Machine, console: Console) -> None:
    """Print the constants of a machine."""
    table = _table(f"{machine.name}, measured", ("constant", "value"), 1)
    table.add_row("device memory, GB/s", f"{machine.memory_gbps:.1f}")
    table.add_row("link, GB/s", f"{machine.link_gbps:.2f}")
    table.add_row("matrix multiplication, TFLOP/s", f"{machine.tflops:.1f}")
    table.add_row("least time of a kernel, us", f"{machine.launch_us:.2f}")
    for op, us in sorted(machine.latency_us.items()):
        table.add_row(f"{op} beside its bytes, us", f"{us:.2f}")
    console.print(table)


def print_parts(parts: Iterable[Mapping[str, Any]], console: Console) -> None:
    """Print what became of each part of the suite."""
    table = _table("", ("part", "status", "seconds", "reason"), 4)
    for part in parts:
        seconds = f"{part['seconds']:.0f}" if "seconds" in part else "-"
        table.add_row(part["name"], part["status"], seconds, part.get("reason", ""))
    console.print(table)


def _rows(result: Mapping[str, Any]) -> Mapping[str, Any]:
    rows: Mapping[str, Any] = result["by_overlap"]
    return rows


def _print_baselines(batch: str, found: Mapping[str, Any], console: Console) -> None:
    _print_skipped(batch, found["skipped"], console)
    if "static" not in found:
        return
    table = _table(
        f"{batch}, transformers' caches, overlap {found['overlap']}",
        ("cache", "ms", "logits", "over scheduled"),
        1,
    )
    ours = found["scheduled"]["median"]
    for name in ("scheduled", "static", "offloaded", "offloaded_repaired"):
        if name not in found:
            continue
        row = found[name]
        agrees = {True: "agree", False: "WRONG"}.get(row.get("agrees"), "")
        if name == "offloaded_repaired":
            agrees += f" ({row['repair']})"
        table.add_row(name, _ms(row["median"]), agrees, _ratio(row["median"] / ours))
    console.print(table)


def _print_skipped(what: str, skipped: Mapping[str, str], console: Console) -> None:
    for name, reason in skipped.items():
        console.print(f"{what}: {name} is left out: {reason}.", markup=False)


def _table(title: str, columns: Sequence[str], left: int) -> Table:
    """Return an empty table whose first `left` columns are text and the others numbers."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right")
    return table


def _ms(us: float) -> str:
    return f"{us / 1e3:.3f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
