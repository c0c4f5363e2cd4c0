"""What a plan keeps: its stages, its sites, the layout of its cache."""

from __future__ import annotations

from typing import Any

import pytest

from sparda_compile import SpardaConfig
from sparda_compile.capture.causal_lm import as_causal_lm, sliding_windows
from sparda_compile.errors import ConfigError
from sparda_compile.forecast.projection import ProjectionShape
from sparda_compile.graph.text import graph_text
from sparda_compile.passes import PIPELINE
from sparda_compile.program import plan as plan_module
from sparda_compile.program.captures import Captures
from sparda_compile.program.plan import Plan, forecast_shapes, make_plan
from sparda_compile.testing import tiny_llama

CONFIG = SpardaConfig(mode="forecast", top_k=None, block_size=16, lowering="eager", max_tokens=64)
PASSES = [graph_pass.name for graph_pass in PIPELINE]


@pytest.fixture(scope="module")
def captures() -> Captures:
    # Wider than its heads together, so that no size stands for another by accident.
    model = tiny_llama(hidden_size=48)
    return Captures(as_causal_lm(model), sliding_windows(model))


def plan_of(
    captures: Captures,
    phase: str = "decode",
    batch_size: int = 1,
    **changes: Any,
) -> Plan:
    return make_plan(
        captures,
        phase,
        CONFIG.replace(**changes),
        batch_size=batch_size,
        max_tokens=64,
    )


def test_stages_are_the_capture_and_every_pass(captures: Captures) -> None:
    plan = plan_of(captures)
    assert [stage.name for stage in plan.stages] == ["capture", *PASSES]
    texts = {name: str(plan.stage(name).graph) for name in ("capture", "replace_attention")}
    assert "sparda.kv_update" in texts["capture"]
    assert "sparse_attention" not in texts["capture"]
    assert "sparda.kv_update" not in texts["replace_attention"]
    assert "sparse_attention" in texts["replace_attention"]
    assert str(plan.stage(None).graph) == str(plan.stage(PASSES[-1]).graph)
    assert str(plan.stage(None).graph) == str(plan.graph_module.graph)


@pytest.mark.parametrize("name", ["", "lower", "Capture"])
def test_unknown_stages_are_errors_that_name_the_known(captures: Captures, name: str) -> None:
    wanted = f"after='{name}' is no stage; stages are capture, {', '.join(PASSES)}"
    with pytest.raises(ConfigError, match=wanted):
        plan_of(captures).stage(name)


def test_disabled_passes_leave_no_stage_and_no_schedule(captures: Captures) -> None:
    assert plan_of(captures).schedule is not None
    plan = plan_of(captures, disable_passes=("schedule_transfers",))
    assert plan.schedule is None
    with pytest.raises(ConfigError, match="schedule_transfers"):
        plan.stage("schedule_transfers")


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"mode": "forecast"}, (0, 1)),
        ({"mode": "exact", "hint": "forecast"}, (0, 1)),
        ({"mode": "exact", "hint": "previous_step"}, ()),
        ({"mode": "query"}, ()),
        ({"mode": "dense"}, ()),
    ],
)
def test_forecast_shapes_are_those_of_the_mode(
    captures: Captures, changes: dict[str, str], layers: tuple[int, ...]
) -> None:
    plan = plan_of(captures, **changes)
    shapes = forecast_shapes(plan)
    assert set(shapes) <= set(layers)
    assert bool(shapes) == bool(layers)
    assert 1 in shapes or not layers
    assert all(shape == ProjectionShape(2 * 16, 48) for shape in shapes.values())


def test_only_the_stage_that_is_asked_for_is_made(captures: Captures) -> None:
    plan = plan_of(captures)
    plan.stage("insert_prefetch")
    made = [stage.name for stage in plan.stages if "graph" in stage.__dict__]
    assert made == ["insert_prefetch"]


@pytest.mark.parametrize("phase", ["decode", "sparse_prefill"])
def test_graphs_are_those_of_the_stages_made_in_one_run(
    captures: Captures, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(captures, phase=phase)
    ran = []
    run_passes = plan_module.run_passes

    def counted(gm: Any, passes: Any, *context: Any) -> Any:
        ran.extend(graph_pass.name for graph_pass in passes)
        return run_passes(gm, passes, *context)

    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "run_passes", counted)
        texts = [graph_text(graph) for graph in plan.graphs()]
    assert len(ran) == len(set(ran))
    assert texts == [graph_text(stage.graph) for stage in plan.stages]
