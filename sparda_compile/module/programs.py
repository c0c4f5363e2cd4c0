"""The programs of one module, by phase, shape and result; each built when first asked for.

A module that meets ever new shapes does not keep all that it built: the program that was asked for
longest ago makes room. One that runs is held by its caller until it has ended.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Final

from sparda_compile.config import round_up
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.program.plan import Plan, make_plan, planned_capacity
from sparda_compile.program.program import Program
from sparda_compile.program.prompt_cost import prompt_phase

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparda_compile.config import SpardaConfig
    from sparda_compile.forecast.projection import Projection
    from sparda_compile.program.captures import Captures
    from sparda_compile.ranks.agreement import Ranks

__all__ = ["MOST_PROGRAMS", "PHASES", "Programs"]

MOST_PROGRAMS: Final = 16
"""Programs that one module keeps: a prefill and a decode for each of eight shapes."""
PHASES: Final = ("prefill", "sparse_prefill", "decode")
_SMALLEST_CAPACITY: Final = 512
_CAPACITY_STEP: Final = 8192


class Programs:
    """The programs of one module.

    Args:
        captures: Traced forwards of the model.
        config: What to build.
        forecast: Forecast projections by target layer.

    Attributes:
        forecast: The same.
    """

    def __init__(
        self, captures: Captures, config: SpardaConfig, forecast: Mapping[int, Projection]
    ) -> None:
        self._captures = captures
        self._config = config
        self.forecast = forecast
        # In the order in which they were asked for last.
        self._programs: dict[tuple[str, int, int, bool], Program] = {}
        self._num_dropped: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._latest: dict[str, tuple[int, int, bool]] = {}

    def get(self, phase: str, batch_size: int, max_tokens: int, *, last_only: bool) -> Program:
        """Return the program for a shape.

        Args:
            phase: One of `PHASES`.
            batch_size: Sequences.
            max_tokens: Tokens per sequence that its KV cache holds.
            last_only: Whether it returns the logits of the last token alone.
        """
        key = (phase, batch_size, max_tokens, last_only)
        with self._lock:
            program = self._programs.pop(key, None)
            if program is None:
                plan = make_plan(
                    self._captures,
                    phase,
                    self._config,
                    batch_size=batch_size,
                    max_tokens=max_tokens,
                    last_logits_only=last_only,
                )
                program = Program(plan, self.forecast)
            self._keep(key, program)
            self._latest[phase] = (batch_size, max_tokens, last_only)
        return program

    def prompt_phase(self, batch_size: int, num_past: int, num_tokens: int) -> str:
        """Return the phase in which new tokens of a prompt are read, of `PHASES`.

        Args:
            batch_size: Sequences.
            num_past: Tokens of the longest one before them.
            num_tokens: New ones.
        """
        return prompt_phase(self._captures, self._config, batch_size, num_past, num_tokens)

    def put(self, plan: Plan, program: Program | None = None) -> Program:
        """Enter a program for a plan's shape, in the place of any other; None makes one.

        The plan is one that returns the logits of the last token alone.
        """
        layout = plan.layout
        key = (plan.phase, layout.batch_size, layout.max_tokens, True)
        program = program or Program(plan, self.forecast)
        with self._lock:
            self._programs.pop(key, None)
            self._keep(key, program)
        return program

    def _keep(self, key: tuple[str, int, int, bool], program: Program) -> None:
        """Enter a program as the newest, and let the oldest go where there are too many."""
        self._programs[key] = program
        if len(self._programs) > MOST_PROGRAMS:
            oldest = next(iter(self._programs))
            if self._programs.pop(oldest).is_compiled:
                self._num_dropped[oldest[0]] += 1

    def latest_plan(self, phase: str) -> Plan:
        """Return the plan of a phase that ran last; one for a single sequence before that.

        Raises:
            UnsupportedInputError: If there is no such phase.
        """
        if phase not in PHASES:
            raise UnsupportedInputError(f"phase {phase!r} is not known; use {', '.join(PHASES)}.")
        default = (1, planned_capacity(self._config), True)
        batch_size, max_tokens, last_only = self._latest.get(phase, default)
        return self.get(phase, batch_size, max_tokens, last_only=last_only).plan

    def compiled(self) -> list[Program]:
        """Return those at hand that have run, or were compiled ahead."""
        with self._lock:
            return [program for program in self._programs.values() if program.is_compiled]

    def num_compiled(self) -> dict[str, int]:
        """Return how many programs were compiled so far, by phase; those let go count too."""
        with self._lock:
            phases = [program.plan.phase for program in self.compiled()]
            counts = {phase: phases.count(phase) + self._num_dropped[phase] for phase in PHASES}
        return {phase: n for phase, n in counts.items() if n or phase != "sparse_prefill"}

    @property
    def ranks(self) -> Ranks:
        """The processes that run the model."""
        return self._captures.ranks

    @property
    def config(self) -> SpardaConfig:
        """What is built."""
        return self._config

    def capacity(self, num_tokens: int) -> int:
        """Return the capacity reserved for so many tokens: few sizes, so few programs."""
        if self._config.max_tokens is not None:
            return self._config.max_tokens
        if num_tokens <= _CAPACITY_STEP:
            return max(_SMALLEST_CAPACITY, 1 << (num_tokens - 1).bit_length())
        return round_up(num_tokens, _CAPACITY_STEP)
