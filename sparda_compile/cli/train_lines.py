"""What `sparda train` says while it works, and what it keeps of it."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Final

from sparda_compile.cli.console import make_console

if TYPE_CHECKING:
    from sparda_compile.training.report import HeldOutReport, StepReport

__all__ = ["TrainingLines", "share_in_words"]

_LINE_EVERY_S: Final = 5.0


def share_in_words(value: float) -> str:
    """Return a recall, or that there is none."""
    return "unknown (too short)" if math.isnan(value) else f"{value:.3f}"


class TrainingLines:
    """Says where a training is, on stderr, where there is no terminal for a progress bar."""

    def __init__(self, accumulate: int) -> None:
        self.steps = 0
        self.accumulate = accumulate
        self.reports: list[StepReport] = []
        self.measures: list[HeldOutReport] = []
        self.console = make_console(stderr=True)
        self.last = time.monotonic()
        self.say("importing torch and transformers")

    def say(self, text: str) -> None:
        """Print a line at once."""
        from sparda_compile.training.parallel import rank_of_environment

        self.last = time.monotonic()
        if not self.console.is_terminal and not rank_of_environment():
            self.console.print(f"{text} ...", markup=False, style="dim", soft_wrap=True)

    def batch(self, done: int, steps_before: int) -> None:
        """Say how far a step is, if nothing was said for a while."""
        if time.monotonic() - self.last >= _LINE_EVERY_S and done < self.accumulate:
            self.say(f"step {steps_before + 1} of {self.steps}, batch {done} of {self.accumulate}")

    def measured(self, report: HeldOutReport) -> None:
        """Keep what the held-out documents gave, and say it."""
        self.measures.append(report)
        self.say(
            f"held-out documents behind step {report.step}: loss {report.loss:.4f}, recall "
            f"{share_in_words(report.recall)}"
        )

    def step(self, report: StepReport) -> None:
        """Keep what a step saw; say it of the first, the last, and from time to time."""
        self.reports.append(report)
        is_end = len(self.reports) == 1 or report.step == self.steps
        if not is_end and time.monotonic() - self.last < _LINE_EVERY_S:
            return
        mean = sum(each.seconds for each in self.reports) / len(self.reports)
        left = round(mean * (self.steps - report.step))
        self.say(
            f"step {report.step} of {self.steps}: loss {report.loss:.4f}, recall "
            f"{share_in_words(report.recall)}, {report.seconds:.1f} s a step, about {left} s left"
        )
