"""`sparda bench decode --trace`: steps of a real model to follow, checked before work begins."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparda_compile.cli.options import MOST_BLOCKS
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparda_compile.bench.decode import DecodeSetting
    from sparda_compile.bench.recorded import RecordedSteps
    from sparda_compile.traces import TraceFile

__all__ = ["Copies", "FollowedTraces", "TraceCases", "TraceOption", "read_traces"]

TraceOption = Annotated[
    Path | None,
    typer.Option(help="Blocks of a real model to follow, as `sparda eval trace` wrote them."),
]
TraceCases = Annotated[
    list[str] | None,
    typer.Option(
        help="Of the trace, such as 'infllm2 10%', may be given again.", show_default="all"
    ),
]
Copies = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_BLOCKS,
        help="How often the recorded context stands in the long one.",
        show_default="as the number of blocks asks for",
    ),
]


@dataclasses.dataclass(frozen=True)
class FollowedTraces:
    """A file of traces, its name without the ending, and what of it is followed."""

    name: str
    file: TraceFile
    cases: tuple[RecordedSteps, ...]

    def setting(self, setting: DecodeSetting, overlaps: Sequence[float]) -> DecodeSetting:
        """Return a setting that follows the traces, and the overlaps that are asked for.

        Raises:
            ConfigError: If it takes more steps than were recorded.
        """
        fields = {**setting.settings, "top_k": self.cases[0].scored}
        return dataclasses.replace(
            setting, recorded=self.cases, overlaps=tuple(overlaps), settings=fields
        )

    def plain(self) -> dict[str, Any]:
        """Return where the traces come from, for JSON."""
        names = [each.case for each in self.cases]
        plain = {"name": self.name, "sha256": self.file.sha256, "model": self.file.model}
        return {**plain, "cases": names}


def read_traces(
    path: Path | None, names: Sequence[str], copies: int | None, tp: int = 1
) -> FollowedTraces | None:
    """Read what is to be followed; None without a file.

    Args:
        path: Of the file.
        names: Of cases; empty for all.
        copies: How often the recorded context stands in the long one; None comes nearest to the
            default number of blocks.
        tp: Ranks that share the model.

    Raises:
        ConfigError: If there is no such file or case, options of a trace come without one, or
            there are several ranks.
    """
    if path is None:
        if names or copies:
            raise ConfigError(
                "trace_case and copies are of a trace; pass trace, or leave them out."
            )
        return None
    if tp > 1:
        raise ConfigError(f"tp={tp} ranks follow no trace; leave trace out, or use tp=1.")
    from sparda_compile.bench.recorded import choose_cases
    from sparda_compile.traces import load_traces

    file = load_traces(path)
    assert SpardaConfig.top_k is not None
    if file.block_size != SpardaConfig.block_size:
        raise ConfigError(
            f"trace={str(path)!r} is of blocks of {file.block_size} tokens, and the benchmark has "
            f"{SpardaConfig.block_size}; record it with --block-size {SpardaConfig.block_size}."
        )
    cases = choose_cases(file, names, copies, SpardaConfig.top_k)
    return FollowedTraces(path.stem, file, tuple(cases))
