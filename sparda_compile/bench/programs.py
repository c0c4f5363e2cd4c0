"""The programs that are compared: one pipeline, other knobs.

Each variant is a name that results are listed by:

    scheduled   mode forecast, KV cache in CPU memory, copies scheduled on their own stream
    inline      the same without InsertPrefetch and ScheduleTransfers: every copy in line
    resident    mode forecast, every block on the device: what no copy could beat
    dense       every block on the device, all of them read
    body        the model with every attention removed: what is left of a step
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.bench.trace import following
from sparda_compile.config import Lowering, SpardaConfig
from sparda_compile.forecast.start import initial_forecast
from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.nodes import replace_and_erase
from sparda_compile.graph.site import sites_of
from sparda_compile.graph.tags import FACTS
from sparda_compile.passes.manager import run_passes
from sparda_compile.passes.rewrite.fuse_projections import FuseProjections
from sparda_compile.passes.schedule.simulate import end_us, predict
from sparda_compile.program.plan import Plan, forecast_shapes, make_plan
from sparda_compile.program.program import Program
from sparda_compile.state.layout import CacheLayout

if TYPE_CHECKING:
    from sparda_compile.program.captures import Captures

__all__ = ["KNOBS", "build_body", "build_program", "plan_body", "predicted_us", "variant_config"]

_COPIES: Final = ("insert_prefetch", "schedule_transfers")
KNOBS: Final[dict[str, dict[str, object]]] = {
    "scheduled": {"mode": "forecast", "offload": "always"},
    "inline": {"mode": "forecast", "offload": "always", "disable_passes": _COPIES},
    "resident": {"mode": "forecast", "offload": "never"},
    "dense": {"mode": "dense", "offload": "never"},
}


def variant_config(
    variant: str, max_tokens: int, trace_steps: int, **settings: object
) -> SpardaConfig:
    """Return the configuration of a variant, whose selection follows a trace.

    Args:
        variant: A key of `KNOBS`.
        max_tokens: Tokens per sequence that the KV cache holds.
        trace_steps: Steps of the trace, 0 for none.
        **settings: Further fields of SpardaConfig; `dense` has no other mode.
    """
    if variant == "dense":
        settings = {n: value for n, value in settings.items() if n not in ("mode", "hint")}
    fields: dict[str, Any] = {**KNOBS[variant], "max_tokens": max_tokens, **settings}
    return following(SpardaConfig(**fields), trace_steps)


def build_program(
    captures: Captures,
    variant: str,
    batch_size: int,
    max_tokens: int,
    trace_steps: int,
    **settings: object,
) -> Program:
    """Return the decode program of a variant; its Forecast starts as `optimize` has it.

    Args:
        captures: The model's traced forwards.
        variant: A key of `KNOBS`.
        batch_size: Sequences.
        max_tokens: Tokens per sequence that the KV cache holds.
        trace_steps: Steps of the trace that selection follows.
        **settings: Further fields of SpardaConfig.
    """
    config = variant_config(variant, max_tokens, trace_steps, **settings)
    plan = make_plan(
        captures,
        "decode",
        config,
        batch_size=batch_size,
        max_tokens=max_tokens,
    )
    dtype = next(captures.model.parameters()).dtype
    forecast = initial_forecast(
        plan.stage("find_attention").graph, plan.sites, forecast_shapes(plan), plan.captured, dtype
    )
    return Program(plan, forecast)


def predicted_us(captures: Captures, plan: Plan, overlap: float) -> float:
    """Return the predicted time of a step that follows a trace, microseconds.

    A trace says which blocks every scorer picks. So in mode `exact` a hint that scores names all
    that its layer selects, whatever recall it has elsewhere.

    Args:
        captures: The model's traced forwards.
        plan: The program, scheduled for whatever was expected when it was made.
        overlap: Share of scored blocks that a step has in common with the one before.
    """
    ctx = captures.sites(plan.phase, plan.layout.config).context(plan.layout)
    config = ctx.config.replace(expected_overlap=overlap, expected_recall=1.0)
    return end_us(predict(plan.graph_module.graph, dataclasses.replace(ctx, config=config)))


def build_body(captures: Captures, batch_size: int, lowering: Lowering = "inductor") -> Program:
    """Return the decode program without attention; see `plan_body`."""
    config = SpardaConfig(mode="dense", offload="never", lowering=lowering)
    return Program(plan_body(captures, batch_size, config), {})


def plan_body(captures: Captures, batch_size: int, config: SpardaConfig) -> Plan:
    """Return the plan of a decode without attention: the query passes for its output.

    Keys and values are still computed, and go into the sum, so that no compiler drops them. There
    is no cache; the program runs on one of this layout, which is empty.
    """
    found = captures.sites("decode", config)
    gm, stages = found.copy(), found.records()
    sites = tuple(sites_of(gm.graph))
    for site in sites:
        emit = Emitter(gm.graph, site.anchor, site.anchor, site.layer)
        both = emit.function(torch.add, (site.k, site.v), {})
        wide = emit.method("repeat_interleave", both, site.num_heads // site.num_groups, 1)
        passed = emit.function(torch.add, (site.query, wide), {})
        replace_and_erase(gm.graph, site.anchor, passed)
    FACTS.put(gm, FACTS.of(gm) | FuseProjections.requires)  # it needs only to come behind that pass
    layout = CacheLayout(config, (), batch_size, config.block_size)
    stages += run_passes(gm, [FuseProjections()], found.context(layout))
    machine = captures.machine(config)
    return Plan(
        captured=found.captured,
        phase="decode",
        layout=layout,
        sites=sites,
        stages=tuple(stages),
        graph_module=gm,
        machine=machine,
        graphs=lambda: (stage.graph for stage in stages),
    )
