"""From a captured forward to a verified graph: run the pipeline.

    captured --copy--> graph --PIPELINE--> verified graph

One `Plan` is that path for one phase, batch size and capacity, kept stage by stage so that every
graph can be looked at. `program.py` makes it run.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Final

from torch import fx, nn

from sparda_compile import ops
from sparda_compile.capture.forward import CapturedGraph, capture, share_weights
from sparda_compile.errors import ConfigError, UnsupportedInputError
from sparda_compile.forecast.projection import from_inputs
from sparda_compile.graph.nodes import copy_graph, fake_value, snapshot
from sparda_compile.graph.site import AttentionSite, sites_of
from sparda_compile.passes import PIPELINE
from sparda_compile.passes.base import PassContext
from sparda_compile.passes.find.find_attention import FindAttention
from sparda_compile.passes.machine import machine_for
from sparda_compile.passes.manager import StageRecord, run_passes
from sparda_compile.program.lower import split_graph
from sparda_compile.progress import showing, stage
from sparda_compile.state.layout import CacheLayout, LayerShape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparda_compile.config import SpardaConfig
    from sparda_compile.forecast.projection import ProjectionShape
    from sparda_compile.program.joined_weight import JoinedWeight
    from sparda_compile.report.schedule import Schedule

__all__ = ["Captures", "Plan", "forecast_shapes", "make_plan", "planned_capacity"]

assert ops.OPS  # registers every op before a pass emits one

_PLANNED_TOKENS = 4096
# Not a pass: the last graph, as it is cut for the compiler.
SPLIT: Final = "split"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A rewritten graph and how it came to be.

    Attributes:
        captured: Where it began.
        layout: Sizes of the KV cache that it takes.
        sites: The model's attentions.
        stages: Graphs after capture and after each pass.
        graph_module: The last graph.
    """

    captured: CapturedGraph
    layout: CacheLayout
    sites: tuple[AttentionSite, ...]
    stages: tuple[StageRecord, ...]
    graph_module: fx.GraphModule

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
    trace_steps: int = 0,
) -> Plan:
    """Run the pipeline on a captured forward.

    Args:
        captures: The model's traced forwards.
        phase: `prefill` or `decode`.
        config: What to build.
        batch_size: Sequences.
        max_tokens: Tokens per sequence that the KV cache holds.
        last_logits_only: Whether the program returns the logits of the last token alone.
        trace_steps: For benchmarks: steps of the trace that selection follows, 0 for none.

    Raises:
        AttentionNotFoundError: If the model has no attention, or one that is not implemented.
        UnsupportedInputError: If the model's forward does not use position_ids.
        PassError: If a pass fails.
    """
    with showing(config.progress):
        return _plan(captures, phase, config, batch_size, max_tokens, last_logits_only, trace_steps)


def _plan(
    captures: Captures,
    phase: str,
    config: SpardaConfig,
    batch_size: int,
    max_tokens: int,
    last_logits_only: bool,
    trace_steps: int,
) -> Plan:
    captured = captures.get(phase, last_logits_only=last_logits_only)
    machine = machine_for(config.machine, captured.device)
    ctx = PassContext(
        config, phase, dict(captures.windows), captures.model_name, None, machine, batch_size
    )
    found = captures.with_sites(captured, ctx, last_logits_only=last_logits_only)
    gm = snapshot(found.graph_module)
    sites = tuple(sites_of(gm.graph))
    layout = CacheLayout(
        config, tuple(_layer_shape(s, max_tokens) for s in sites), batch_size, max_tokens,
        trace_steps,
    )  # fmt: skip
    planned = dataclasses.replace(ctx, layout=layout.traced())

    def graph_after(last: str) -> fx.Graph:
        again = snapshot(found.graph_module)
        run_passes(again, PIPELINE[1 : _place(last) + 1], planned, graph_after)
        return again.graph

    stages = run_passes(gm, PIPELINE[1:], planned, graph_after)
    return Plan(captured, layout, sites, (*found.records(), *stages), gm)


def _place(name: str) -> int:
    return [graph_pass.name for graph_pass in PIPELINE].index(name)


def _check_positions(captured: CapturedGraph, gm: fx.GraphModule, model_name: str) -> None:
    names = [name for name, role in captured.inputs.items() if role == "position_ids"]
    used = [n for n in gm.graph.nodes if n.op == "placeholder" and n.name in names and n.users]
    if not used:
        raise UnsupportedInputError(
            f"{model_name}: forward does not use position_ids, so a decode step cannot tell it "
            "where its token stands. Give forward a position_ids argument (absolute positions, "
            "[B, T] int64) and derive every position from it."
        )


def _layer_shape(site: AttentionSite, max_tokens: int) -> LayerShape:
    window = min(site.window, max_tokens) if site.window else 0
    dtype = fake_value(site.k).dtype
    return LayerShape(site.layer, site.kind, site.num_groups, site.head_dim, window, dtype)


class Captures:
    """The traced forwards of one model; shared by every module optimized from it.

    Args:
        model: A causal LM of transformers.
        windows: Sliding window of each layer, 0 for none.
    """

    def __init__(self, model: nn.Module, windows: Mapping[int, int]) -> None:
        self.model = share_weights(model)
        self.model_name = type(model).__name__
        self.windows = dict(windows)
        self._graphs: dict[tuple[str, bool], CapturedGraph] = {}
        self._found: dict[tuple[str, bool, SpardaConfig], _Found] = {}
        self._joined: dict[tuple[int, ...], JoinedWeight] = {}

    @property
    def num_captures(self) -> int:
        """Times that a forward was traced."""
        return len(self._graphs)

    def get(self, phase: str, *, last_logits_only: bool = True) -> CapturedGraph:
        """Return a traced forward, for any number of sequences; traced when first asked for."""
        key = (phase, last_logits_only)
        if key not in self._graphs:
            with stage("capture", f"the {phase}"):
                captured = capture(self.model, phase, last_logits_only=last_logits_only)
            self._graphs[key] = dataclasses.replace(captured, joined=self._joined)
        return self._graphs[key]

    def with_sites(
        self, captured: CapturedGraph, ctx: PassContext, *, last_logits_only: bool
    ) -> _Found:
        """Return a traced forward whose attentions are found; no size of a cache changes that."""
        key = (captured.phase, last_logits_only, ctx.config)
        if key not in self._found:
            gm = captured.copy()
            first = StageRecord(
                "capture", lambda: captured.copy().graph, {"nodes": len(gm.graph.nodes)}, 0.0
            )
            stages = run_passes(gm, [FindAttention(captured.weights)], ctx)
            _check_positions(captured, gm, ctx.model)
            self._found[key] = _Found(gm, (first, *stages))
        return self._found[key]


@dataclasses.dataclass(frozen=True)
class _Found:
    """A traced forward whose attentions are found."""

    graph_module: fx.GraphModule
    stages: tuple[StageRecord, ...]

    def records(self) -> list[StageRecord]:
        """Return records for one more plan, which shares no graph with others."""
        return [
            dataclasses.replace(stage, rebuild=partial(_copy_of, stage)) for stage in self.stages
        ]


def _copy_of(record: StageRecord) -> fx.Graph:
    return copy_graph(record.graph)


def forecast_shapes(plan: Plan) -> dict[int, ProjectionShape]:
    """Return the sizes of each Forecast projection that a decode plan takes, by target layer."""
    nodes = [n for n in plan.graph_module.graph.nodes if n.op == "placeholder"]
    projections = from_inputs({node.name: fake_value(node) for node in nodes})
    return {layer: projection.shape for layer, projection in projections.items()}
