"""What a user waits for before tokens come: fresh processes, one after another.

    cold    with empty folders for what Inductor and Triton compile
    warm    another process, with the folders that the cold one left

Beside ours run transformers' caches, on the same model and prompts: `dynamic` is eager, `static` is
what transformers compiles by itself on a GPU. A row is saved whenever its process has found
something more. A process that fails or takes too long is reported; the others still run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import sparda_compile
from sparda_compile.bench.start_child import TOKENS, Job
from sparda_compile.progress import STAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "DEFAULT_SCENARIOS",
    "Run",
    "add_found",
    "beyond",
    "measure_start",
    "plan_runs",
    "totals",
]

# The last two share a batch size, not the capacity of their KV caches.
DEFAULT_SCENARIOS: Final = {
    "cuda": ("1x1024", "1x131072", "16x8192", "1x1024", "4x1024", "4x8192"),
    "cpu": ("1x300", "1x3000", "2x300", "3x300"),
}

# Where programs are kept between processes.
_CACHES: Final = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_MAIN: Final = "from sparda_compile.bench.start_child import main; main()"
_LOOK_S: Final = 0.1
_NUM_LINES: Final = 12
_UNFINISHED: Final = "more is still to be measured"
_NOT_COMPILED: Final = (
    "transformers compiles its static cache on a GPU alone: this one runs eagerly"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One process to start.

    Attributes:
        program: `sparda`, `dynamic` or `static`.
        cache: `cold` or `warm`; warm comes after the cold one of the same program.
    """

    program: str
    cache: str

    def __str__(self) -> str:
        """Return the name of its row."""
        return f"{self.program} {self.cache}"


def plan_runs(device: str, *, with_baselines: bool) -> tuple[Run, ...]:
    """Return the processes to start, in order; what compiles nothing runs once."""
    both = (Run("sparda", "cold"), Run("sparda", "warm"))
    if not with_baselines:
        return both
    runs = (*both, Run("dynamic", "cold"), Run("static", "cold"))
    return (*runs, Run("static", "warm")) if device == "cuda" else runs


def measure_start(
    job: Job,
    runs: Sequence[Run],
    timeout: float,
    save: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Start the processes one after another.

    Args:
        job: What each does; its program is that of each run.
        runs: As `plan_runs` has them.
        timeout: Seconds for each.
        save: Given a row whenever there is more of it.
        say: Told what is going on.

    Returns:
        A row for each run.
    """
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory("", "sparda-start-", ignore_cleanup_errors=True) as folder:
        for run in runs:
            row: dict[str, Any] = {"run": str(run), **dataclasses.asdict(run), "scenarios": []}
            if run.program == "static" and job.device != "cuda":
                row["note"] = _NOT_COMPILED
            rows[str(run)] = row
            say(str(run))
            cold = rows.get(f"{run.program} cold", row)
            if "failed" in cold:
                row["failed"] = f"left out: {run.program} cold, which was to fill its cache, failed"
            else:
                mine = dataclasses.replace(job, program=run.program)
                failure = _run(mine, Path(folder), str(run), timeout, _listener(row, save, say))
                row |= {"failed": failure} if failure else {}
            save(row)
    return list(rows.values())


def _listener(
    row: dict[str, Any], save: Callable[[dict[str, Any]], None], say: Callable[[str], None]
) -> Callable[[dict[str, Any]], None]:
    """Return what takes in a piece of a row."""

    def hear(found: dict[str, Any]) -> None:
        add_found(row, found)
        save({**row, "unfinished": _UNFINISHED})
        for name in ("optimize", "scenario"):
            if name in found:
                say(f"{row['run']}: {found['scenario'] if name == 'scenario' else name} is done")

    return hear


def _run(
    job: Job, folder: Path, name: str, timeout: float, hear: Callable[[dict[str, Any]], None]
) -> str | None:
    """Run a job in a process of its own; returns what went wrong."""
    found, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    found.touch()
    command = _command(job, found)
    with log.open("wb") as output, found.open(encoding="utf-8") as lines:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=_environment(folder / job.program),
            start_new_session=True,
        )
        end = time.monotonic() + timeout
        try:
            while (code := process.poll()) is None and time.monotonic() < end:
                _hear_all(lines, hear)
                time.sleep(_LOOK_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its compilers too
                process.wait()
        _hear_all(lines, hear)
    if code == 0:
        return None
    what = f"stopped after {timeout:g} s" if code is None else f"ended with code {code}"
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return "\n".join([what, *text.splitlines()[-_NUM_LINES:]])


def _command(job: Job, found: Path) -> list[str]:
    """Return the command of a process; the time in it is when it was made."""
    plain = json.dumps(dataclasses.asdict(job))
    return [sys.executable, "-c", _MAIN, plain, str(found), repr(time.time())]


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process: caches below a folder, and this package."""
    root = str(Path(sparda_compile.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    caches = {name: str(folder / name.lower()) for name in _CACHES}
    return {**os.environ, **caches, "PYTHONPATH": os.pathsep.join(paths)}


def _hear_all(lines: Any, hear: Callable[[dict[str, Any]], None]) -> None:
    """Hand on what was written since the last time, whole lines alone."""
    while True:
        place = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(place)
            return
        hear(json.loads(line))


def add_found(row: dict[str, Any], found: Mapping[str, Any]) -> None:
    """Add what a process has found to its row."""
    if "scenario" not in found:
        imports = {**row.get("import_s", {}), **found.get("import_s", {})}
        row |= {**found, "import_s": imports}
        return
    scenario = dict(found)
    if "repeat" in scenario:
        scenario["beyond_s"] = beyond(scenario["first_use"], scenario["repeat"])
    row["scenarios"].append(scenario)


def beyond(first_use: Mapping[str, Any], repeat: Mapping[str, Any]) -> dict[str, float]:
    """Return what a first use takes beyond the work itself, by token and in total."""
    found = {name: first_use["token_s"][name] - repeat["token_s"][name] for name in TOKENS}
    found["total"] = first_use["total_s"] - repeat["total_s"]
    return {name: round(seconds, 4) for name, seconds in found.items()}


def totals(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of a whole process, but for its model.

    Returns:
        `import`, `optimize`, each of `STAGES`, and `beyond`, the sum of all scenarios.
    """
    parts = [row.get("optimize", {})]
    for scenario in row["scenarios"]:
        parts += [scenario.get(use, {}) for use in ("first_use", "repeat")]
    return {
        "import": sum(row.get("import_s", {}).values()),
        "optimize": row.get("optimize", {}).get("total_s", 0.0),
        **{s: sum(part.get("stage_s", {}).get(s, 0.0) for part in parts) for s in STAGES},
        "beyond": sum(s["beyond_s"]["total"] for s in row["scenarios"] if "beyond_s" in s),
    }
