"""The time to the first token of a prompt, and what the next tokens take.

    cold     the first `generate` of that length: programs are made, compiled and proved
    compare  logits of ours against the model's own, where each token reads all of its blocks
    warm     `generate` of 30 tokens, several times: the first one, 2 to 10, and 11 to 30
    profile  after all lengths: ours are made again, and the first token of a warm call is profiled

Up to 32K tokens programs take turns; longer prompts are read by one program after another, and what
is found is saved after each. A call that would take longer than a limit is left out. So is what
would not end in the time that there is; it is measured by the next run. The profiler slows what
comes behind it: so nothing is profiled before everything is timed.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.bench.hidden import can_profile, profile_copies
from sparda_compile.bench.prompt_floor import fit_law, prompt_floor
from sparda_compile.bench.prompt_programs import (
    BACKENDS,
    NO_MEMORY,
    OURS,
    OURS_OFFLOADED,
    PREFILL_BACKENDS,
    REPEAT,
    out_of_memory,
    prompt_of,
    same_chunks,
)
from sparda_compile.bench.sharing import count_unions
from sparda_compile.bench.timing import Spread
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from sparda_compile.bench.prompt_floor import Rates
    from sparda_compile.bench.prompt_programs import PromptPrograms
    from sparda_compile.bench.result_file import ResultFile
    from sparda_compile.bench.shapes import ModelShape

__all__ = [
    "DEFAULT_TOKENS",
    "NUM_NEW",
    "PrefillBench",
    "PrefillSetting",
    "best_baseline",
    "seconds_of",
    "with_laws",
]

# The most important ones first.
DEFAULT_TOKENS: Final = (1024, 131072, 32768, 524288, 1048576, 4096)
NUM_NEW: Final = 30
_EARLY: Final = slice(1, 10)
_STEADY: Final = slice(10, NUM_NEW)
# Read in turns up to here.
_IN_TURNS: Final = 32768
# Of all rounds of one program together, seconds; one round is taken in any case.
_ROUND_S: Final = 30.0
# To make and compile one of ours.
_BUILD_S: Final = 45.0
# Times the floor, before anything of a program is known.
_OVER_FLOOR: Final = 2.0
# What a length says of one so many times as long; short prompts wait for the CPU.
_NEAR: Final = 32
_UNFINISHED: Final = "some programs were left out for want of time"
# What attends to everything before a token.
_QUADRATIC: Final = ("dense", *PREFILL_BACKENDS)


@dataclasses.dataclass(frozen=True)
class PrefillSetting:
    """What to measure.

    Attributes:
        tokens: Lengths of prompts, the most important ones first.
        programs: Names of `OURS` and of `PREFILL_BACKENDS`.
        rounds: Most warm calls of one program at one length.
        limit_s: Most seconds of one call.
        minutes: Time for everything.
        settings: Fields of SpardaConfig.
        repeat: How often each token of a prompt stands in a row.
        profile: Whether to profile ours, on a GPU.
    """

    tokens: tuple[int, ...] = DEFAULT_TOKENS
    programs: tuple[str, ...] = (*OURS_OFFLOADED, *PREFILL_BACKENDS)
    rounds: int = 5
    limit_s: float = 130.0
    minutes: float = 60.0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    repeat: int = REPEAT
    profile: bool = True

    def __post_init__(self) -> None:
        """Check what a run would only find out after minutes."""
        if min(self.tokens, default=0) < 2:
            raise ConfigError(f"tokens {self.tokens} are no prompts; use lengths of 2 or more.")
        if self.rounds < 1:
            raise ConfigError(f"rounds={self.rounds} is too small; use 1 or more.")


@dataclasses.dataclass
class _Run:
    """What was found of one program at one length; times by round, seconds to each token."""

    row: dict[str, Any]
    rounds: int
    times: list[list[float]]


class PrefillBench:
    """Measures the prompts of one model.

    Args:
        programs: Of the model.
        shape: Its sizes.
        rates: Of the GPU.
        setting: What to measure.
        say: Told what is going on.
        clock: Seconds.
    """

    def __init__(
        self,
        programs: PromptPrograms,
        shape: ModelShape,
        rates: Rates,
        setting: PrefillSetting,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.programs = programs
        self.shape = shape
        self.rates = rates
        self.setting = setting
        self.say = say
        self.clock = clock
        self.end = clock() + 60 * setting.minutes

    def measure(self, file: ResultFile) -> list[dict[str, Any]]:
        """Measure every length that the file does not hold as a whole; returns its results."""
        for tokens in self.setting.tokens:
            self._length(tokens, file)
        if self.setting.profile and can_profile(self.programs.device):
            for tokens in self.setting.tokens:
                self._profile(tokens, file)
        for result in with_laws(file.results):
            if result != file.get(result["tokens"]):
                file.save(result)
        return file.results

    def _length(self, tokens: int, file: ResultFile) -> None:
        kept = file.get(tokens) or {"programs": {}, "skipped": {}}
        rows: dict[str, Any] = dict(kept["programs"])
        settings = self.setting.settings
        done = [name for name, row in rows.items() if same_chunks(name, row, settings)]
        todo = [name for name in self.setting.programs if name not in done]
        skipped = {name: why for name, why in kept["skipped"].items() if name not in todo}
        late = list(skipped) if "unfinished" in kept else []
        for group in [todo] if tokens <= _IN_TURNS else [[name] for name in todo]:
            found, left_out, no_time = self._group(group, tokens, file.results)
            rows |= found
            skipped |= left_out
            late += no_time
            file.save(self._result(tokens, rows, skipped, _UNFINISHED))
        if todo:
            file.save(self._result(tokens, rows, skipped, _UNFINISHED if late else None))

    def _profile(self, tokens: int, file: ResultFile) -> None:
        """Add what a profiler sees of the copies of ours, where a row lacks it."""
        result = file.get(tokens)
        assert result is not None
        names = [name for name in self.setting.programs if name in OURS]
        rows = {name: result["programs"][name] for name in names if name in result["programs"]}
        for name in [name for name, row in rows.items() if "copies" not in row]:
            reason = self._no_time(name, tokens, file.results)
            found = {"copies_skipped": reason} if reason else self._copies(name, tokens)
            if "copies_skipped" in found:
                self.say(f"{tokens} tokens: {name} is not profiled: {found['copies_skipped']}")
            row = {key: value for key, value in rows[name].items() if key != "copies_skipped"}
            result = {**result, "programs": {**result["programs"], name: {**row, **found}}}
            file.save(result)

    def _copies(self, name: str, tokens: int) -> dict[str, Any]:
        self.say(f"{tokens} tokens: profiling {name}")
        self.programs.drop()
        ids = prompt_of(tokens, self.programs.vocabulary, self.programs.device, self.setting.repeat)
        try:
            self.programs.generate(name, ids, NUM_NEW)  # makes and compiles it
            return profile_copies(partial(self.programs.first_token, name, ids, NUM_NEW))
        except NO_MEMORY as error:
            return {"copies_skipped": out_of_memory(error)}
        finally:
            self.programs.drop()

    def _result(
        self,
        tokens: int,
        rows: Mapping[str, Any],
        skipped: Mapping[str, str],
        unfinished: str | None,
    ) -> dict[str, Any]:
        result: dict[str, Any] = {
            "tokens": tokens,
            "rates": dataclasses.asdict(self.rates),
            "auto": self.programs.auto(tokens),
            "programs": {name: rows[name] for name in (*OURS, *BACKENDS) if name in rows},
            "skipped": dict(skipped),
        }
        return {**result, "unfinished": unfinished} if unfinished else result

    def _group(
        self, names: Sequence[str], tokens: int, known: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, str], list[str]]:
        """Measure programs in turns; returns rows, what was left out, and for want of time."""
        skipped: dict[str, str] = {}
        late: list[str] = []
        runs: dict[str, _Run] = {}
        place = (self.programs.vocabulary, self.programs.device)
        ids = prompt_of(tokens, *place, self.setting.repeat)
        others = 0
        for name in names:
            reason = self._reason(name, tokens, known)
            if reason is None and (reason := self._no_time(name, tokens, known)):
                late.append(name)
            if reason is None:
                self.say(f"{tokens} tokens: {name}")
                found = self._first(name, ids, others)
                if isinstance(found, _Run):
                    runs[name] = found
                    others += self.programs.kv_bytes(name, on_host=False)
                    continue
                reason = found
            self.say(f"{tokens} tokens: {name} is left out: {reason}")
            skipped[name] = reason
        for round_ in range(1, max((run.rounds for run in runs.values()), default=0)):
            for name, run in runs.items():
                if round_ < run.rounds:
                    run.times.append(self.programs.generate(name, ids, NUM_NEW))
        rows = {name: {**run.row, **self._times(name, tokens, run)} for name, run in runs.items()}
        self.programs.drop()
        return rows, skipped, late

    def _reason(self, name: str, tokens: int, known: Sequence[Mapping[str, Any]]) -> str | None:
        """Return why a program is not to be measured, None if it is."""
        reason = self.programs.forbids(name, tokens, with_past=False)
        expected = self._expected(name, tokens, known)
        if reason is None and expected > self.setting.limit_s:
            return (
                f"a call takes about {expected:.0f} s, more than the limit of "
                f"{self.setting.limit_s:g}"
            )
        return reason

    def _no_time(self, name: str, tokens: int, known: Sequence[Mapping[str, Any]]) -> str | None:
        expected = self._expected(name, tokens, known)
        seconds = (_BUILD_S if name in OURS else 0.0) + 2 * expected
        left = max(self.end - self.clock(), 0.0)
        if seconds <= left:
            return None
        return f"it takes about {seconds / 60:.1f} minutes, and {left / 60:.1f} are left"

    def _expected(self, name: str, tokens: int, known: Sequence[Mapping[str, Any]]) -> float:
        """Return about what one call takes: the floor, by what was measured of other lengths."""
        over = _OVER_FLOOR
        rows = {r["tokens"]: r["programs"].get(name) for r in known}
        near = [n for n, row in rows.items() if row and tokens / _NEAR <= n < tokens]
        if near:
            over = rows[max(near)]["over_floor"]
        return over * self._floor(name, tokens)["total"]

    def _floor(self, name: str, tokens: int) -> dict[str, float]:
        config = self.programs.config(name if name in OURS else "dense")
        return prompt_floor(self.shape, name, config, tokens, self.rates)

    def _first(self, name: str, ids: Tensor, others: int) -> _Run | str:
        """Take the cold call, compare, and take a warm one; returns why not where it cannot.

        Args:
            name: A program.
            ids: [1, T] int64.
            others: Bytes on the GPU of the caches of programs that take turns with this one.
        """
        programs, tokens = self.programs, ids.shape[1]
        row: dict[str, Any] = {}
        try:
            with count_unions(programs.device) as sharing:
                row["cold_s"] = round(programs.generate(name, ids, NUM_NEW)[0], 4)
            if shared := sharing.row():
                row["sharing"] = shared
            if name in OURS:
                row["chunk_tokens"] = programs.config(name).chunk_tokens
                row["compared"] = programs.compare(name, tokens, tokens + NUM_NEW, with_past=False)
            held = torch.cuda.memory_allocated()
            _reset_peak(programs.device)
            times = programs.generate(name, ids, NUM_NEW)
        except NO_MEMORY as error:
            return out_of_memory(error)
        # Weights that ours have joined stay on the GPU, and are none of what the model needs.
        used = programs.weight_bytes + others if name in OURS else held
        beyond = max(torch.cuda.max_memory_allocated() - used, 0)
        row["peak_gpu_bytes_beyond_weights"] = beyond
        row["peak_gpu_bytes"] = beyond + programs.weight_bytes
        row["host_kv_bytes"] = programs.kv_bytes(name, on_host=True)
        rounds = max(min(int(_ROUND_S / times[0]), self.setting.rounds), 1)
        return _Run(row, rounds, [times])

    def _times(self, name: str, tokens: int, run: _Run) -> dict[str, Any]:
        first = Spread.of([times[0] for times in run.times])
        steady = statistics.median(t for times in run.times for t in times[_STEADY])
        early = [statistics.median(each) for each in zip(*run.times, strict=True)][_EARLY]
        floor = self._floor(name, tokens)
        return {
            "first_token_s": {
                key: round(value, 5) for key, value in dataclasses.asdict(first).items()
            },
            "steady_s": round(steady, 6),
            "tokens_2_to_10_s": [round(each, 6) for each in early],
            "tokens_2_to_10_over_steady": [round(each / steady, 3) for each in early],
            "floor_s": {part: round(value, 5) for part, value in floor.items()},
            "over_floor": round(first.median / floor["total"], 3),
        }


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def seconds_of(result: Mapping[str, Any], name: str) -> tuple[float | None, bool]:
    """Return the seconds to the first token, and whether they are by a law and not measured."""
    if name in result["programs"]:
        return float(result["programs"][name]["first_token_s"]["median"]), False
    law = result.get("by_law", {}).get(name)
    return (float(law["first_token_s"]), True) if law else (None, False)


def best_baseline(result: Mapping[str, Any]) -> str | None:
    """Return the fastest program of transformers, None if there is none."""
    found = {name: seconds_of(result, name)[0] for name in PREFILL_BACKENDS}
    times = {name: seconds for name, seconds in found.items() if seconds is not None}
    return min(times, key=lambda name: times[name], default=None)


def with_laws(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the results with what only all of them together say.

    `by_law` has the programs that attend to everything, where they were left out: the time that
    their own shorter prompts make likely. `transformers_over` has ours by how many times the
    fastest program of transformers, named in `transformers`, takes as long.
    """
    laws = {}
    for name in _QUADRATIC:
        measured = {
            r["tokens"]: r["programs"][name]["first_token_s"]["median"]
            for r in results
            if name in r["programs"]
        }
        laws[name] = fit_law(measured)
    return [_with_law(result, laws) for result in results]


def _with_law(result: Mapping[str, Any], laws: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = dict(result)
    tokens, by_law = result["tokens"], {}
    for name, law in laws.items():
        is_longer = law is not None and tokens > max(law["fitted_to"])
        if is_longer and name in result["skipped"]:
            seconds = law["linear"] * tokens + law["quadratic"] * tokens**2
            by_law[name] = {"first_token_s": round(seconds, 3), **law}
    found["by_law"] = by_law
    best = best_baseline(found)
    found.pop("transformers", None)
    found.pop("transformers_over", None)
    if best is not None:
        theirs, is_law = seconds_of(found, best)
        assert theirs is not None
        found["transformers"] = {"program": best, "first_token_s": theirs, "by_law": is_law}
        found["transformers_over"] = {
            name: round(theirs / found["programs"][name]["first_token_s"]["median"], 3)
            for name in OURS
            if name in found["programs"]
        }
    return found
