"""What options of several commands share: names to choose from, and how large a number may be.

Names come from where the library has them, so a new selector is offered without a change here.
A number beyond its limit is refused before any work begins.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, get_args

import typer

from sparda_compile import config, selection
from sparda_compile.bench import names as bench_names
from sparda_compile.cli.real_model import forecast_file
from sparda_compile.evaluation import names as task_names
from sparda_compile.registry import HINTS, KV_FORMATS, SELECTORS
from sparda_compile.training import names as teacher_names

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "LARGEST_SEED",
    "MOST_BLOCKS",
    "MOST_GIB",
    "MOST_MINUTES",
    "MOST_SEQUENCES",
    "MOST_STEPS",
    "MOST_TOKENS",
    "MOST_TURNS",
    "Choice",
    "Commit",
    "Device",
    "ForecastFile",
    "Hint",
    "HostGib",
    "KvFormat",
    "LocalBlocks",
    "Lowering",
    "Machine",
    "Mode",
    "Offload",
    "OffloadingMode",
    "OutFolder",
    "PageFormat",
    "PrefillCandidates",
    "PrefillSelector",
    "Prompt",
    "PromptProgram",
    "Repair",
    "Rounds",
    "SelectingMode",
    "Selector",
    "Shape",
    "ShapeOption",
    "ShortList",
    "Steps",
    "Task",
    "Teacher",
    "TextPrompt",
    "TextTask",
    "Tokens",
    "Variant",
    "Where",
    "choices",
]

# Whole blocks of every size.
MOST_TOKENS: Final = config.MOST_TOKENS // 128 * 128
MOST_BLOCKS: Final = MOST_TOKENS // 16
MOST_SEQUENCES: Final = 1 << 16
MOST_TURNS: Final = 1_000_000
MOST_STEPS: Final = 1 << 31
MOST_MINUTES: Final = 1e6
MOST_GIB: Final = 1e6
LARGEST_SEED: Final = (1 << 32) - 1


class Choice(str, enum.Enum):
    """A name out of a list; typer knows enums as choices, the library takes it for the string."""

    __str__ = str.__str__
    __repr__ = str.__repr__
    __format__ = str.__format__  # type: ignore[assignment]
    __hash__ = str.__hash__


def choices(title: str, names: Iterable[str]) -> type[Choice]:
    """Return a class whose members are the names, for the annotation of an option."""
    made: type[Choice] = Choice(title, {name: name for name in names})  # type: ignore[call-overload]
    return made


if TYPE_CHECKING:
    # What typer makes of them are strings.
    Hint = str
    KvFormat = str
    Machine = str
    Selector = str
    Mode = config.Mode
    OffloadingMode = config.Mode
    PageFormat = config.PageFormat
    SelectingMode = config.Mode
    Lowering = config.Lowering
    Offload = config.Offload
    Repair = selection.Repair
    Where = selection.Where
    Device = bench_names.DeviceName
    Shape = bench_names.ShapeName
    Prompt = task_names.PromptName
    PromptProgram = bench_names.PromptProgramName
    Task = task_names.TaskName
    Teacher = teacher_names.Teacher
    TextPrompt = task_names.TextPromptName
    TextTask = task_names.TextTaskName
    Variant = bench_names.VariantName
else:
    Hint = choices("Hint", HINTS.choices())
    KvFormat = choices("KvFormat", KV_FORMATS.choices())
    Machine = choices("Machine", config.MACHINE_NAMES)
    Selector = choices("Selector", SELECTORS.choices())
    Mode = choices("Mode", get_args(config.Mode))
    PageFormat = choices("PageFormat", get_args(config.PageFormat))
    SelectingMode = choices("SelectingMode", (m for m in get_args(config.Mode) if m != "dense"))
    OffloadingMode = choices("OffloadingMode", ("query", "forecast", "exact"))
    Lowering = choices("Lowering", get_args(config.Lowering))
    Offload = choices("Offload", get_args(config.Offload))
    Repair = choices("Repair", get_args(selection.Repair))
    Where = choices("Where", get_args(selection.Where))
    Device = choices("Device", get_args(bench_names.DeviceName))
    Shape = choices("Shape", get_args(bench_names.ShapeName))
    Prompt = choices("Prompt", get_args(task_names.PromptName))
    PromptProgram = choices("PromptProgram", get_args(bench_names.PromptProgramName))
    Task = choices("Task", get_args(task_names.TaskName))
    Teacher = choices("Teacher", get_args(teacher_names.Teacher))
    TextPrompt = choices("TextPrompt", get_args(task_names.TextPromptName))
    TextTask = choices("TextTask", get_args(task_names.TextTaskName))
    Variant = choices("Variant", get_args(bench_names.VariantName))

Commit = Annotated[str | None, typer.Option(help="Commit to note, where this is no git checkout.")]
HostGib = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=MOST_GIB, help="Most CPU memory for KV, GiB.", show_default="what is free"
    ),
]
LocalBlocks = Annotated[
    int, typer.Option(min=0, max=MOST_BLOCKS, help="Most recent blocks, always read.")
]
ShortList = Annotated[
    int,
    typer.Option(
        min=0,
        max=MOST_BLOCKS,
        help="Blocks that selector nosa picks by the query or the Forecast.",
    ),
]
PrefillSelector = Annotated[
    Selector | None,
    typer.Option(
        help="How tokens of a sparse prompt score blocks: infllm2 takes less time than lowbit2 and "
        "lowbit4, which multiply with the key of every token.",
        show_default="the selector",
    ),
]
PrefillCandidates = Annotated[
    float | None,
    typer.Option(
        min=1.0,
        max=MOST_BLOCKS,
        help="Times the scored budget blocks that tokens of a sparse prompt score by each low-bit "
        "key; a look by the mean query proposes them.",
        show_default="all blocks",
    ),
]
ForecastFile = Annotated[
    Path | None,
    typer.Option(
        callback=forecast_file,
        help="File of Forecast weights, or smollm2: those of that model for lowbit2.",
    ),
]
OutFolder = Annotated[Path, typer.Option(help="Folder for the JSON files.")]
ShapeOption = Annotated[Shape, typer.Option(help="Model to make.")]
Tokens = Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens per sequence.")]
Rounds = Annotated[int, typer.Option(min=1, max=MOST_TURNS, help="Turns of each program.")]
Steps = Annotated[int, typer.Option(min=1, max=MOST_TURNS, help="Steps of one turn.")]
