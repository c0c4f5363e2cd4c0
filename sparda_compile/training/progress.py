"""What a training shows while it runs, and steps that an interrupt does not cut in two."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from typing import TYPE_CHECKING, Any

from sparda_compile.training import parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sparda_compile.training.report import StepReport

__all__ = ["step_bar", "uninterrupted"]


@contextlib.contextmanager
def step_bar(steps: int, *, shown: bool) -> Iterator[Callable[[StepReport], None]]:
    """Yield what shows a step on a terminal's progress bar, or does nothing."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not shown or parallel.rank() or not console.is_terminal:
        yield lambda report: None
        return
    text = TextColumn("loss {task.fields[loss]:.4f}  recall {task.fields[recall]:.3f}")
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), text)
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("training", total=steps, loss=math.nan, recall=math.nan)
        yield lambda report: bar.update(
            task, completed=report.step, loss=report.loss, recall=report.recall
        )


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the end of the block; threads other than the main one get none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if asked:
            if not callable(before):
                raise KeyboardInterrupt
            before(*asked[0])
