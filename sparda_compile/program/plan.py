"""From a captured forward to a verified graph: run the pipeline.

    captured --copy--> graph --PIPELINE--> verified graph

One `Plan` is that path for one phase, batch size and capacity, kept stage by stage so that every
graph can be looked at. `program.py` makes it run.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from torch import fx

from sparda_compile import ops
from sparda_compile.errors import ConfigError
from sparda_compile.forecast.projection import from_inputs
from sparda_compile.graph.nodes import fake_value, find_ops
from sparda_compile.graph.site import AttentionSite, sites_of
from sparda_compile.graph.tags import LAYER
from sparda_compile.passes import PIPELINE
from sparda_compile.passes.manager import StageRecord, run_passes
from sparda_compile.passes.schedule.layer_times import layer_times
from sparda_compile.program.lower import split_graph
from sparda_compile.progress import showing, stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from sparda_compile.capture.forward import CapturedGraph
    from sparda_compile.config import SpardaConfig
    from sparda_compile.forecast.projection import ProjectionShape
    from sparda_compile.passes.base import PassContext
    from sparda_compile.passes.machine import Machine
    from sparda_compile.passes.schedule.layer_times import LayerTimes
    from sparda_compile.program.captures import Captures
    from sparda_compile.report.schedule import Schedule
    from sparda_compile.state.layout import CacheLayout

__all__ = ["Plan", "forecast_shapes", "make_plan", "planned_capacity"]

assert ops.OPS  # registers every op before a pass emits one

_PLANNED_TOKENS = 4096
# Not a pass: the last graph, as it is cut for the compiler.
SPLIT: Final = "split"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A rewritten graph and how it came to be.

    Attributes:
        captured: Where it began.
        phase: `prefill`, `sparse_prefill` or `decode`.
        layout: Sizes of the KV cache that it takes.
        sites: The model's attentions.
        stages: Graphs after capture and after each pass.
        graph_module: The last graph.
        machine: Constants that it was planned with.
        speculated: What the parts of each layer take that begins its attention early, by layer.
        graphs: Yields the graph after each stage, in the order of `stages`; it changes when the
            next one is asked for. To make them all takes one run of the passes.
    """

    captured: CapturedGraph
    phase: str
    layout: CacheLayout
    sites: tuple[AttentionSite, ...]
    stages: tuple[StageRecord, ...]
    graph_module: fx.GraphModule
    machine: Machine
    graphs: Callable[[], Iterable[fx.Graph]]
    speculated: Mapping[int, LayerTimes] = dataclasses.field(default_factory=dict)

    @property
    def schedule(self) -> Schedule | None:
        """The schedule, None where scheduling is disabled."""
        return next((s.schedule for s in self.stages if s.schedule is not None), None)

    def stage(self, name: str | None) -> fx.GraphModule:
        """Return the graph after a stage; the last one for None, cut into pieces for `split`.

        Raises:
            ConfigError: If there is no such stage.
        """
        by_name = {stage.name: stage for stage in self.stages}
        if name is None:
            return self.stages[-1].graph_module
        if name == SPLIT:
            return split_graph(self.graph_module)
        if name not in by_name:
            stages = ", ".join((*by_name, SPLIT))
            raise ConfigError(f"after={name!r} is no stage; stages are {stages}.")
        return by_name[name].graph_module  # made again when it is first looked at


def planned_capacity(config: SpardaConfig) -> int:
    """Return the tokens per sequence that are planned for before anything has run."""
    return config.max_tokens or _PLANNED_TOKENS


def make_plan(
    captures: Captures,
    phase: str,
    config: SpardaConfig,
    *,
    batch_size: int,
    max_tokens: int,
    last_logits_only: bool = True,
) -> Plan:
    """Run the pipeline on a captured forward.

    Args:
        captures: The model's traced forwards.
        phase: `prefill`, `sparse_prefill` or `decode`.
        config: What to build.
        batch_size: Sequences.
        max_tokens: Tokens per sequence that the KV cache holds.
        last_logits_only: Whether the program returns the logits of the last token alone.

    Raises:
        AttentionNotFoundError: If the model has no attention, or one that is not implemented.
        UnsupportedInputError: If the model's forward does not use position_ids.
        PassError: If a pass fails.
    """
    # One stage around those of the passes: what shows them begins once.
    with showing(config.progress), stage("passes"):
        return _plan(captures, phase, config, batch_size, max_tokens, last_logits_only)


def _plan(
    captures: Captures,
    phase: str,
    config: SpardaConfig,
    batch_size: int,
    max_tokens: int,
    last_logits_only: bool,
) -> Plan:
    traced = "decode" if phase == "decode" else "prefill"
    found = captures.sites(traced, config, last_logits_only=last_logits_only)
    layout = found.layout(batch_size, max_tokens)
    ctx = dataclasses.replace(found.context(layout), phase=phase)
    gm = found.copy()
    sites = tuple(sites_of(gm.graph))

    def graph_after(last: str) -> fx.Graph:
        again = found.copy()
        run_passes(again, PIPELINE[1 : _place(last) + 1], ctx, graph_after)
        return again.graph

    def graphs() -> Iterator[fx.Graph]:
        yield from (record.graph for record in found.records())
        again = found.copy()
        for graph_pass in PIPELINE[1:]:
            for _ in run_passes(again, [graph_pass], ctx, graph_after):
                yield again.graph

    stages = run_passes(gm, PIPELINE[1:], ctx, graph_after)
    records = (*found.records(), *stages)
    early = _speculated(gm, sites, ctx)
    return Plan(found.captured, phase, layout, sites, records, gm, ctx.machine, graphs, early)


def _speculated(
    gm: fx.GraphModule, sites: Sequence[AttentionSite], ctx: PassContext
) -> dict[int, LayerTimes]:
    """Return what the parts of layers take whose attention begins early."""
    assert ctx.layout is not None
    early = {LAYER.of(node) for node in find_ops(gm.graph, "attend_predicted")}
    shapes = {shape.layer: shape for shape in ctx.layout.layers}
    return {
        site.layer: layer_times(shapes[site.layer], site.num_heads // site.num_groups, ctx)
        for site in sites
        if site.layer in early
    }


def _place(name: str) -> int:
    return [graph_pass.name for graph_pass in PIPELINE].index(name)


def forecast_shapes(plan: Plan) -> dict[int, ProjectionShape]:
    """Return the sizes of each Forecast projection that a decode plan takes, by target layer."""
    nodes = [n for n in plan.graph_module.graph.nodes if n.op == "placeholder"]
    projections = from_inputs({node.name: fake_value(node) for node in nodes})
    return {layer: projection.shape for layer, projection in projections.items()}
