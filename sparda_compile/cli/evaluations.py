"""`sparda eval`: on generated tasks, which is what it does by itself, or on real text.

sparda eval [MODEL] ...        generated tasks, as `sparda eval tasks`
sparda eval text MODEL ...     real text
sparda eval formats MODEL ...  the smallest format of blocks that each layer stands
sparda eval trace MODEL ...    the blocks that are selected on it, in a file for benchmarks
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import typer
from typer.core import TyperGroup

from sparda_compile.cli.evaluate import evaluate_model
from sparda_compile.cli.evaluate_formats import evaluate_formats
from sparda_compile.cli.evaluate_text import evaluate_text
from sparda_compile.cli.record import record_trace

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["eval_app"]

_USUAL: Final = "tasks"


class _TasksByDefault(TyperGroup):
    """Takes what names no command for arguments of the usual one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the usual command in front where there is none."""
        return super().parse_args(ctx, _with_command(args, [*self.commands]))


def _with_command(args: Sequence[str], commands: Sequence[str]) -> list[str]:
    is_whole = args and (args[0] in commands or args[0] == "--help")
    return [*args] if is_whole else [_USUAL, *args]


eval_app = typer.Typer(
    cls=_TasksByDefault,
    help="Measure what selection costs: on generated tasks (sparda eval [MODEL]) or on real text.",
)
eval_app.command(_USUAL)(evaluate_model)
eval_app.command("text")(evaluate_text)
eval_app.command("formats")(evaluate_formats)
eval_app.command("trace")(record_trace)
