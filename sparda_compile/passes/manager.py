"""Run passes in order: check what they require, lint, check the grammar, count, time, snapshot."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import os
import time
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

from sparda_compile.errors import ConfigError, PassError, SpardaError
from sparda_compile.graph.nodes import copy_graph
from sparda_compile.graph.tags import FACTS
from sparda_compile.passes.check.spec import check_spec
from sparda_compile.progress import stage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sparda_compile.passes.base import Fact, GraphPass, PassContext
    from sparda_compile.report.schedule import Schedule
from sparda_compile.graph.nodes import as_module
from sparda_compile.graph.text import graph_text

__all__ = ["StageRecord", "check_disabled", "check_dump_dir", "run_passes"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """A graph as one pass left it.

    Attributes:
        name: The pass, or `capture`.
        rebuild: Makes the graph again, or keeps a copy of it.
        counts: What the pass counted.
        ms: Milliseconds that it took.
        schedule: The schedule, from ScheduleTransfers alone.
    """

    name: str
    rebuild: Callable[[], fx.Graph]
    counts: dict[str, int]
    ms: float
    schedule: Schedule | None = None

    @cached_property
    def graph(self) -> fx.Graph:
        """The graph, a copy."""
        return self.rebuild()

    @cached_property
    def graph_module(self) -> fx.GraphModule:
        """The graph as a module, for looking at."""
        return as_module(self.graph)


def run_passes(
    gm: fx.GraphModule,
    passes: Sequence[GraphPass],
    ctx: PassContext,
    graph_after: Callable[[str], fx.Graph] | None = None,
) -> list[StageRecord]:
    """Run passes on a graph, in place.

    Args:
        gm: The graph; its facts are kept in `gm.meta`.
        passes: In order; those named in `config.disable_passes` are left out.
        ctx: What the passes may know.
        graph_after: Makes the graph as it was after a pass, for a record that is looked at; None
            lets each record keep a copy.

    Returns:
        One record per pass that ran.

    Raises:
        PassError: If a pass fails, has run before, or requires what does not hold.
        SpardaError: As raised by a pass on purpose.
    """
    records = []
    for graph_pass in passes:
        if graph_pass.name in ctx.config.disable_passes:
            _log.debug("%s %s: disabled", ctx.phase, graph_pass.name)
            continue
        facts: frozenset[Fact] = FACTS.get(gm, frozenset())
        _check_facts(graph_pass, facts)
        start = time.perf_counter()
        try:
            with stage("verify" if graph_pass.name.startswith("verify") else "passes"):
                result = graph_pass(gm, ctx)
        except SpardaError:
            raise
        except Exception as error:
            raise PassError(
                f"{graph_pass.name} failed on the {ctx.phase} graph of {ctx.model}: "
                f"{type(error).__name__}: {error}"
            ) from error
        ms = (time.perf_counter() - start) * 1e3
        FACTS.put(gm, facts | graph_pass.ensures)
        gm.graph.lint()
        check_spec(gm.graph, FACTS.of(gm), ctx, graph_pass.name)
        _log.debug("%s %s: %s in %.1f ms", ctx.phase, graph_pass.name, result.counts, ms)
        rebuild = partial(graph_after or _kept(gm.graph), graph_pass.name)
        records.append(StageRecord(graph_pass.name, rebuild, result.counts, ms, result.schedule))
        if ctx.config.dump_dir is not None:
            _dump(gm, Path(ctx.config.dump_dir), f"{ctx.phase}_{graph_pass.name}")
    gm.recompile()
    return records


def _kept(graph: fx.Graph) -> Callable[[str], fx.Graph]:
    copy = copy_graph(graph)
    return lambda _: copy


def _check_facts(graph_pass: GraphPass, facts: frozenset[Fact]) -> None:
    if graph_pass.ensures <= facts:
        raise PassError(
            f"{graph_pass.name} has already run on this graph "
            f"({', '.join(f.name for f in graph_pass.ensures)} holds); a pass runs once. "
            "Start again from the captured graph."
        )
    missing = graph_pass.requires - facts
    if missing:
        raise PassError(
            f"{graph_pass.name} requires {', '.join(sorted(f.name for f in missing))}, which does "
            "not hold; run the pass that ensures it first."
        )


def check_dump_dir(folder: str | None) -> None:
    """Check that graphs can be written to a folder, and make it.

    Raises:
        ConfigError: If they cannot.
    """
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"dump_dir={folder!r} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"dump_dir={folder!r} cannot be written to; use another folder.")


def check_disabled(
    names: Sequence[str], passes: Sequence[GraphPass], optional: frozenset[str]
) -> None:
    """Check `disable_passes`.

    Raises:
        ConfigError: If a name is no pass, a pass that the result is wrong without, or one that a
            pass that stays needs.
    """
    known = [graph_pass.name for graph_pass in passes]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"disable_passes names {name!r}, which is no pass; passes are "
                f"{', '.join(known)}.{hint}"
            )
        if name not in optional:
            raise ConfigError(
                f"disable_passes names {name!r}, which cannot be left out: the program would be "
                f"wrong without it. Passes that can be: {', '.join(sorted(optional))}."
            )
    disabled = [graph_pass for graph_pass in passes if graph_pass.name in names]
    staying = [graph_pass for graph_pass in passes if graph_pass.name not in names]
    for gone, left in itertools.product(disabled, staying):
        if gone.ensures & left.requires:
            raise ConfigError(
                f"disable_passes names {gone.name!r}, without which {left.name!r} cannot run; "
                f"name {left.name!r} too."
            )


def _dump(gm: fx.GraphModule, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(graph_text(gm.graph) + "\n")
