"""What the next turn takes, on a long past that is there already.

Nobody reads the past: the same random keys and values go into transformers' dynamic cache on the
GPU, and from one like it into ours, by `new_cache(past=...)`. Then come turns of the same length,
each behind the one before, for one length after the other; a turn is a `generate` of one token.
Before, logits are compared behind a short past, where each token reads all blocks. After all of
that a warm turn of each of ours is profiled; the profiler slows what comes behind it.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.bench.hidden import can_profile, profile_copies
from sparda_compile.bench.memory import dense_kv_bytes, too_big
from sparda_compile.bench.prompt_programs import (
    BACKENDS,
    NO_MEMORY,
    OURS,
    OURS_OFFLOADED,
    REPEAT,
    fill_dynamic,
    out_of_memory,
    prompt_of,
    same_chunks,
)
from sparda_compile.bench.timing import Spread, wait_for
from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from sparda_compile.bench.memory import FreeMemory
    from sparda_compile.bench.prompt_programs import PromptPrograms
    from sparda_compile.bench.result_file import ResultFile
    from sparda_compile.bench.shapes import ModelShape

__all__ = ["DEFAULT_TURNS", "TurnBench", "TurnSetting"]

DEFAULT_TURNS: Final = (1, 200, 4000)
# Of the warm turns of one length together, seconds; one is taken in any case.
_ROUND_S: Final = 20.0
# The first one compiles, the second may capture, the third is warm.
_BEFORE_PROFILE: Final = 3
_UNFINISHED: Final = "more is still to be measured"


@dataclasses.dataclass(frozen=True)
class TurnSetting:
    """What to measure.

    Attributes:
        past: Tokens of the past, one measurement for each.
        turns: Tokens of a turn.
        programs: Names of `OURS` and of `BACKENDS`.
        rounds: Most warm turns of each length.
        settings: Fields of SpardaConfig.
        repeat: How often each token of a turn stands in a row.
        profile: Whether to profile ours, on a GPU.
    """

    past: tuple[int, ...] = (131072,)
    turns: tuple[int, ...] = DEFAULT_TURNS
    programs: tuple[str, ...] = (*OURS_OFFLOADED, *BACKENDS)
    rounds: int = 5
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    repeat: int = REPEAT
    profile: bool = True

    def __post_init__(self) -> None:
        """Check what a run would only find out after minutes."""
        for name in ("past", "turns"):
            values = getattr(self, name)
            if min(values, default=0) < 1 or len(set(values)) < len(values):
                raise ConfigError(f"{name}={values} is not allowed; use 1 or more, each once.")
        if self.rounds < 1:
            raise ConfigError(f"rounds={self.rounds} is too small; use 1 or more.")

    @property
    def new_tokens(self) -> int:
        """Tokens of all turns together, of those that are timed or of those that are profiled."""
        return max(self.rounds + 1, _BEFORE_PROFILE + 1) * sum(self.turns)


class TurnBench:
    """Measures the turns of one model.

    Args:
        programs: Of the model.
        shape: Its sizes.
        free: Returns the memory that is free.
        setting: What to measure.
        say: Told what is going on.
    """

    def __init__(
        self,
        programs: PromptPrograms,
        shape: ModelShape,
        free: Callable[[], FreeMemory],
        setting: TurnSetting,
        say: Callable[[str], None],
    ) -> None:
        self.programs = programs
        self.shape = shape
        self.free = free
        self.setting = setting
        self.say = say

    def measure(self, file: ResultFile) -> list[dict[str, Any]]:
        """Measure every past that the file does not hold as a whole; returns its results."""
        for past in self.setting.past:
            self._past(past, file)
        if self.setting.profile and can_profile(self.programs.device):
            for past in self.setting.past:
                self._profile(past, file)
        return file.results

    def _past(self, past: int, file: ResultFile) -> None:
        kept = file.get(past) or {"programs": {}, "skipped": {}}
        rows: dict[str, Any] = dict(kept["programs"])
        todo = {name: self._missing(name, rows.get(name)) for name in self.setting.programs}
        todo = {name: turns for name, turns in todo.items() if turns}
        skipped = {name: why for name, why in kept["skipped"].items() if name not in todo}
        for name, turns in todo.items():
            self.say(f"{past} tokens: {name}")
            self.programs.drop()
            found = self._misfit(past) or self._program(name, past, turns)
            if isinstance(found, str):
                self.say(f"{past} tokens: {name} is left out: {found}")
                skipped[name] = found
            else:
                by_turn = {**rows.get(name, {}).get("by_turn", {}), **found["by_turn"]}
                rows[name] = {**found, "by_turn": dict(sorted(by_turn.items(), key=_length_of))}
            file.save({**_result(past, rows, skipped), "unfinished": _UNFINISHED})
        self.programs.drop()
        if todo:
            file.save(_result(past, rows, skipped))

    def _profile(self, past: int, file: ResultFile) -> None:
        """Add what a profiler sees of the copies of ours, to each turn that lacks it."""
        result = file.get(past)
        assert result is not None
        for name in [name for name in self.setting.programs if name in OURS]:
            row = result["programs"].get(name, {"by_turn": {}})
            turns = [turn for turn in self.setting.turns if str(turn) in row["by_turn"]]
            turns = [turn for turn in turns if "copies" not in row["by_turn"][str(turn)]]
            if not turns:
                continue
            self.say(f"{past} tokens: profiling {name}")
            self.programs.drop()
            try:
                found = self._copies(name, past, turns)
            except NO_MEMORY as error:
                reason = {"copies_skipped": out_of_memory(error)}
                self.say(f"{past} tokens: {name} is not profiled: {reason['copies_skipped']}")
                found = {str(turn): reason for turn in turns}
            by_turn = {
                turn: {**each, **found.get(turn, {})} for turn, each in row["by_turn"].items()
            }
            row = {**row, "by_turn": by_turn}
            result = {**result, "programs": {**result["programs"], name: row}}
            file.save(result)
        self.programs.drop()

    def _copies(self, name: str, past: int, turns: Sequence[int]) -> dict[str, Any]:
        """Return what a profiler sees of a warm turn of each length."""
        programs = self.programs
        cache = programs.ours(name).new_cache(
            past + self.setting.new_tokens + 1, past=fill_dynamic(programs.model, past)
        )
        text = self._text(past)
        end = past
        found = {}
        for turn in turns:
            for _ in range(_BEFORE_PROFILE):
                end += turn
                programs.generate(name, text[:, :end], 1, **{CACHE_NAME: cache})
            end += turn
            call = partial(programs.generate, name, text[:, :end], 1, **{CACHE_NAME: cache})
            found[str(turn)] = profile_copies(call)
        return found

    def _text(self, past: int) -> Tensor:
        """Return the tokens of a past and of all turns, [1, T]; nobody reads the past."""
        num_tokens = past + self.setting.new_tokens
        place = (self.programs.vocabulary, self.programs.device)
        return prompt_of(num_tokens, *place, self.setting.repeat)

    def _missing(self, name: str, row: Mapping[str, Any] | None) -> tuple[int, ...]:
        """Return the turns that a program's row lacks."""
        if row is None or not same_chunks(name, row, self.setting.settings):
            return self.setting.turns
        return tuple(turn for turn in self.setting.turns if str(turn) not in row["by_turn"])

    def _misfit(self, past: int) -> str | None:
        """Return why a cache on the GPU does not fit; ours are filled from one, too."""
        needed = dense_kv_bytes(self.shape, 1, past + self.setting.new_tokens)
        return too_big("a dynamic cache", needed, "device", self.free().device)

    def _program(self, name: str, past: int, turns: tuple[int, ...]) -> dict[str, Any] | str:
        """Measure one program; returns why not where it cannot."""
        try:
            return (
                self._ours(name, past, turns) if name in OURS else self._theirs(name, past, turns)
            )
        except NO_MEMORY as error:
            return out_of_memory(error)

    def _ours(self, name: str, past: int, turns: tuple[int, ...]) -> dict[str, Any]:
        programs = self.programs
        reserve = past + self.setting.new_tokens + 1
        begin = time.perf_counter()
        compared = {
            str(turn): programs.compare(name, turn, reserve, with_past=True) for turn in turns
        }
        wait_for(programs.device)
        prepare_s = round(time.perf_counter() - begin, 1)
        fast = programs.ours(name)
        cache = fast.new_cache(reserve, past=fill_dynamic(programs.model, past))
        by_turn = self._turns(name, past, turns, cache)
        for turn, found in compared.items():
            by_turn[turn]["compared"] = found
        return {
            "by_turn": by_turn,
            "prepare_s": prepare_s,
            "chunk_tokens": programs.config(name).chunk_tokens,
            "host_kv_bytes": programs.kv_bytes(name, on_host=True),
            "gpu_kv_bytes": programs.kv_bytes(name, on_host=False),
        }

    def _theirs(self, name: str, past: int, turns: tuple[int, ...]) -> dict[str, Any]:
        cache = fill_dynamic(self.programs.model, past)
        by_turn = self._turns(name, past, turns, cache)
        num_bytes = dense_kv_bytes(self.shape, 1, int(cache.get_seq_length()))
        return {"by_turn": by_turn, "host_kv_bytes": 0, "gpu_kv_bytes": num_bytes}

    def _turns(self, name: str, past: int, turns: tuple[int, ...], cache: Any) -> dict[str, Any]:
        """Take the turns of every length on one cache."""
        programs, rounds = self.programs, self.setting.rounds
        text = self._text(past)
        end = past
        by_turn: dict[str, Any] = {}
        for turn in turns:
            if reason := programs.forbids(name, turn, with_past=True):
                by_turn[str(turn)] = {"skipped": reason}
                continue
            seconds: list[float] = []
            while len(seconds) < 2 or (len(seconds) <= rounds and sum(seconds[1:]) < _ROUND_S):
                end += turn
                seconds += programs.generate(name, text[:, :end], 1, **{CACHE_NAME: cache})
            warm = dataclasses.asdict(Spread.of(seconds[1:]))
            found = {"first_s": seconds[0], **warm}
            by_turn[str(turn)] = {key: round(value, 5) for key, value in found.items()}
        return by_turn


def _length_of(item: tuple[str, Any]) -> int:
    return int(item[0])


def _result(past: int, rows: Mapping[str, Any], skipped: Mapping[str, str]) -> dict[str, Any]:
    """Return what was found, with ratios to the fastest program of transformers."""
    programs = {name: rows[name] for name in (*OURS, *BACKENDS) if name in rows}
    over: dict[str, Any] = {}
    for turn in sorted({turn for row in programs.values() for turn in row["by_turn"]}, key=int):
        medians = {
            name: row["by_turn"][turn]["median"]
            for name, row in programs.items()
            if "median" in row["by_turn"].get(turn, {})
        }
        theirs = [name for name in BACKENDS if name in medians]
        if theirs:
            best = min(theirs, key=lambda name: medians[name])
            ratios = {n: round(medians[best] / medians[n], 3) for n in OURS if n in medians}
            over[turn] = {"program": best, **ratios}
    return {
        "past": past,
        "programs": programs,
        "skipped": dict(skipped),
        "transformers_over": over,
    }
