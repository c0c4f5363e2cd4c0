"""Results as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparda_compile.bench.decode import VARIANTS
from sparda_compile.bench.memory import GIB
from sparda_compile.bench.prefill import seconds_of
from sparda_compile.bench.start import totals
from sparda_compile.bench.start_child import TOKENS
from sparda_compile.progress import STAGES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console

    from sparda_compile.passes.machine import Machine

__all__ = [
    "make_table",
    "print_budget",
    "print_decode",
    "print_kernels",
    "print_machine",
    "print_parts",
    "print_prefill",
    "print_start",
    "print_turns",
]

_DECODE_NOTE = """\
Milliseconds of one step, medians. overlap: share of scored blocks that a step has in common with \
the one before. floor: the resident step, or the time of the link if that is longer. MB: bytes \
that a scheduled step copies to the device. pred: the time that the schedule predicts."""

_START_NOTE = """\
Seconds. cold: nothing is compiled yet. warm: another process, which finds what the cold one \
compiled. first, second: to that token, after the one before. beyond: the whole call, less what it \
takes when it is made again."""


_PREFILL_NOTE = """\
Seconds to the first token; cold: the first call of that length. tf/: how many times as long \
transformers takes, by its faster attention. floor: FLOP at the rate of a matrix product, or the \
copy to CPU memory. early: the slowest of tokens 2 to 10 over the steady step, tokens 11 to 30. \
hidden: share of the time of copies that is under compute, and busy: share of the time in which \
the GPU works, to the first token, in a profiler's trace. GPU: peak beyond the weights. \
* not measured: by the law of the same program's shorter prompts."""

_PROFILED: Final = ("hidden", "busy")

_TURNS_NOTE = """\
Milliseconds of a generate of one token behind a past. first: the first turn of that length. tf/: \
how many times as long transformers takes, by its fastest attention. hidden: share of the time of \
copies that is under compute, and busy: share of the time in which the GPU works, in a profiler's \
trace."""


def print_decode(results: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print decode results: a row for each batch size and overlap, and what was left out."""
    names = [n for n in VARIANTS if any(n in row for r in results for row in _rows(r).values())]
    ratios = ("sched/\nbody", "inline/\nsched", "sched/\nfloor", "pred/\nsched")
    columns = ("batch", "overlap", *names, *ratios, "tokens/s", "MB")
    table = make_table("", columns, 0)
    for result in results:
        for overlap, row in _rows(result).items():
            table.add_row(
                str(result["batch_size"]),
                overlap,
                *(_ms(row[name]["median"]) if name in row else "-" for name in names),
                *(
                    _ratio(row.get(name))
                    for name in (
                        "scheduled_over_body",
                        "inline_over_scheduled",
                        "scheduled_over_floor",
                    )
                ),
                _ratio(_predicted_over(row["scheduled"])),
                f"{row['tokens_per_s']:.0f}",
                f"{row['scheduled']['h2d_bytes'] / 1e6:.1f}",
            )
    console.print(table)
    console.print(_DECODE_NOTE, markup=False)
    for result in results:
        batch = f"batch {result['batch_size']}"
        _print_skipped(batch, result.get("skipped", {}), console)
        if "baselines" in result:
            _print_baselines(batch, result["baselines"], console)


def print_budget(results: Iterable[Mapping[str, Any]], console: Console) -> None:
    """Print budgets: batch sizes, what limited them, and throughput."""
    columns = (
        "budget",
        "overlap",
        "side",
        "batch",
        "limited by",
        "device GiB",
        "CPU GiB",
        "ms",
        "tokens/s",
        "ratio",
    )
    table = make_table("", columns, 0)
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
    table = make_table(
        "Gather of 8 MiB from pinned memory", ("programs", "us", "GB/s", "of memcpy"), 0
    )
    for programs, row in gather["by_programs"].items():
        cells = (f"{row['median']:.1f}", f"{row['gbps']:.1f}", f"{row['of_memcpy']:.3f}")
        table.add_row(str(programs), *cells)
    memcpy = gather["memcpy"]
    table.add_row("memcpy", f"{memcpy['median']:.1f}", f"{memcpy['gbps']:.1f}", "1")
    console.print(table)
    columns = ("kernel", "us", "floor us", "over floor", "SDPA us", "FlexAttention us")
    table = make_table("At 128K tokens, 96 blocks selected", columns, 1)
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
    _print_prompt(result["prompt"], console)
    for batch, found in result["beside"].items():
        heads = ("copied by", "alone us", "beside products us", "hidden", "held up")
        table = make_table(f"Beside matrix products, batch {batch[1:]}", heads, 1)
        table.add_row("nobody", "-", f"{found['compute_us']:g}", "-", "-")
        for name, row in found["by_copy"].items():
            keys = ("copy_us", "both_us", "hidden", "held_up")
            table.add_row(name, *(f"{row[key]:g}" for key in keys))
        console.print(table)


def _print_prompt(result: Mapping[str, Any], console: Console) -> None:
    """Print the kernels of a prompt."""
    title = f"{result['tokens']} tokens of a prompt behind {result['past']}, 96 blocks a token"
    columns = ("kernel", "us", "floor us", "over floor", "TFLOP/s", "of a matrix product")
    table = make_table(title, columns, 1)
    for name, row in result["kernels"].items():
        us, floor = row["median"], row["floor_us"]
        rates = (f"{row['tflops']:.0f}", f"{row['of_matmul']:.3f}")
        table.add_row(name, f"{us:.0f}", f"{floor:.0f}", _ratio(us / floor), *rates)
    console.print(table)
    columns = ("attention", "us", "TFLOP/s", "mask us", "ours us", "over ours")
    table = make_table("What others offer, beside ours", columns, 1)
    for name, row in result["others"].items():
        if "skipped" not in row:
            mask = f"{row['mask_us']:.0f}" if "mask_us" in row else "-"
            times = (f"{row['median']:.0f}", f"{row['tflops']:.0f}", mask, f"{row['ours_us']:.0f}")
            table.add_row(name, *times, _ratio(row["over_ours"]))
    console.print(table)
    skipped = {name: row["skipped"] for name, row in result["others"].items() if "skipped" in row}
    _print_skipped("a prompt", skipped, console)


def print_machine(machine: Machine, console: Console) -> None:
    """Print the constants of a machine."""
    table = make_table(f"{machine.name}, measured", ("constant", "value"), 1)
    table.add_row("device memory, GB/s", f"{machine.memory_gbps:.1f}")
    table.add_row("link, GB/s", f"{machine.link_gbps:.2f}")
    table.add_row("matrix multiplication, TFLOP/s", f"{machine.tflops:.1f}")
    table.add_row("least time of a kernel, us", f"{machine.launch_us:.2f}")
    table.add_row("kernel of the model beside its bytes, us", f"{machine.kernel_us:.2f}")
    table.add_row("share that a copy takes from compute", f"{machine.copy_share:.3f}")
    for op, us in sorted(machine.latency_us.items()):
        table.add_row(f"{op} beside its bytes, us", f"{us:.2f}")
    console.print(table)


def print_parts(parts: Iterable[Mapping[str, Any]], console: Console) -> None:
    """Print what became of each part of the suite."""
    table = make_table("", ("part", "status", "seconds", "reason"), 4)
    for part in parts:
        seconds = f"{part['seconds']:.0f}" if "seconds" in part else "-"
        table.add_row(part["name"], part["status"], seconds, part.get("reason", ""))
    console.print(table)


def print_start(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print what starting takes: a column for each process, then what is missing and why."""
    columns = ("prompts", "stage", *(row["run"].replace(" ", "\n") for row in rows))
    table = make_table("", columns, 2)
    whole = [totals(row) for row in rows]
    for place, name in enumerate(("import", "optimize", *STAGES, "beyond")):
        cells = [_seconds(found[name]) for found in whole]
        table.add_row("" if place else "all of them", name, *cells)
    prompts = max(([s["scenario"] for s in row["scenarios"]] for row in rows), key=len)
    for index, prompt in enumerate(prompts):
        found = [row["scenarios"][index] if index < len(row["scenarios"]) else {} for row in rows]
        table.add_section()
        for place, (name, values) in enumerate(_start_rows(found).items()):
            table.add_row("" if place else prompt, name, *map(_seconds, values))
    console.print(table)
    console.print(_START_NOTE, markup=False)
    for row in rows:
        skipped = {s["scenario"]: s["skipped"] for s in row["scenarios"] if "skipped" in s}
        _print_skipped(row["run"], skipped, console)
        if "note" in row:
            console.print(f"{row['run']}: {row['note']}.", markup=False)
        if "failed" in row:
            console.print(f"{row['run']} failed: {row['failed']}", markup=False)


def print_prefill(content: Mapping[str, Any], console: Console) -> None:
    """Print a file of prompts: a row for each length and program, and what was left out."""
    results = content["results"]
    times = ("cold", "first\ntoken", "tf/", "over\nfloor", "early", "steady\nms")
    columns = ("tokens", "program", *times, *_PROFILED, "GPU\nGiB", "CPU\nGiB")
    table = make_table(_selection(content), columns, 2)
    for result in results:
        table.add_section()
        ratios = result.get("transformers_over", {})
        for name in (*result["programs"], *result.get("by_law", {})):
            row = result["programs"].get(name)
            seconds, is_law = seconds_of(result, name)
            cells = [f"{seconds:.3f}" + "*" * is_law, _ratio(ratios.get(name))]
            if row is not None:
                cells = [_seconds(row["cold_s"]), *cells, _ratio(row["over_floor"])]
                cells += [_ratio(max(row["tokens_2_to_10_over_steady"]))]
                cells += [f"{1e3 * row['steady_s']:.2f}", *_profiled(row)]
                places = ("peak_gpu_bytes_beyond_weights", "host_kv_bytes")
                cells += [f"{row[place] / GIB:.1f}" for place in places]
            else:
                cells = ["-", *cells, *["-"] * 7]
            table.add_row(str(result["tokens"]), name, *cells)
    console.print(table)
    console.print(_PREFILL_NOTE, markup=False)
    for result in results:
        tokens = f"{result['tokens']} tokens"
        console.print(f'{tokens}: prefill="auto" is {result["auto"]}.', markup=False)
        _print_skipped(tokens, result["skipped"], console)
        _print_unprofiled(tokens, result["programs"], console)


def print_turns(content: Mapping[str, Any], console: Console) -> None:
    """Print a file of turns: a row for each past, length and program, and what was left out."""
    results = content["results"]
    table = make_table(
        _selection(content), ("past", "turn", "program", "first", "then", "tf/", *_PROFILED), 0
    )
    table.columns[2].justify = "left"
    skipped: dict[str, dict[str, str]] = {}
    for result in results:
        past, programs = f"behind {result['past']}", result["programs"]
        skipped[past] = dict(result["skipped"])
        for turn in dict.fromkeys(turn for row in programs.values() for turn in row["by_turn"]):
            table.add_section()
            ratios = result["transformers_over"].get(turn, {})
            for name, row in programs.items():
                found = row["by_turn"].get(turn, {})
                if "skipped" in found:
                    skipped.setdefault(f"{past}, turns of {turn}", {})[name] = found["skipped"]
                if "median" in found:
                    times = (f"{1e3 * found[key]:.1f}" for key in ("first_s", "median"))
                    ratio = _ratio(ratios.get(name))
                    table.add_row(str(result["past"]), turn, name, *times, ratio, *_profiled(found))
    console.print(table)
    console.print(_TURNS_NOTE, markup=False)
    for what, reasons in skipped.items():
        _print_skipped(what, reasons, console)
    for result in results:
        for turn in {turn: None for row in result["programs"].values() for turn in row["by_turn"]}:
            rows = {n: row["by_turn"].get(turn, {}) for n, row in result["programs"].items()}
            _print_unprofiled(f"behind {result['past']}, turns of {turn}", rows, console)


def _selection(content: Mapping[str, Any]) -> str:
    """Return who selects for ours, where a file says that it is not as usual."""
    names = {"selector": "selector {}", "prefill_selector": "selector of prompts {}"}
    names["prefill_candidates"] = "{}x candidates"
    return ", ".join(said.format(content[n]) for n, said in names.items() if n in content)


def _start_rows(found: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Return the rows of one scenario: a value of each process, None where there is none."""

    def values(use: str, group: str, name: str, default: float | None) -> list[float | None]:
        return [each[use][group].get(name, default) if use in each else None for each in found]

    rows = {name: values("first_use", "stage_s", name, 0.0) for name in STAGES}
    rows = {name: row for name, row in rows.items() if any(row)}
    rows |= {name: values("first_use", "token_s", name, None) for name in TOKENS[:2]}
    beyond = [each["beyond_s"]["total"] if "beyond_s" in each else None for each in found]
    return {**rows, "beyond": beyond}


def _predicted_over(found: Mapping[str, Any]) -> float | None:
    """Return predicted over measured; None for a result from before predictions were kept."""
    return found["predicted_us"] / found["median"] if "predicted_us" in found else None


def _rows(result: Mapping[str, Any]) -> Mapping[str, Any]:
    rows: Mapping[str, Any] = result["by_overlap"]
    return rows


def _print_baselines(batch: str, found: Mapping[str, Any], console: Console) -> None:
    _print_skipped(batch, found["skipped"], console)
    if "static" not in found:
        return
    table = make_table(
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


def _print_unprofiled(what: str, rows: Mapping[str, Any], console: Console) -> None:
    for name, row in rows.items():
        if "copies_skipped" in row:
            reason = row["copies_skipped"]
            console.print(f"{what}: {name} is not profiled: {reason}.", markup=False)


def _profiled(row: Mapping[str, Any]) -> tuple[str, str]:
    return _ratio(row.get("hidden_share")), _ratio(row.get("gpu_busy"))


def make_table(title: str, columns: Sequence[str], left: int) -> Table:
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


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
