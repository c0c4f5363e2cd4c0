"""What a program is given, and what it shares with others of its model."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.capture.causal_lm import as_causal_lm, sliding_windows
from sparda_compile.forecast.start import initial_forecast
from sparda_compile.graph.tags import JOINED
from sparda_compile.passes.rewrite import fuse_projections
from sparda_compile.program import program as program_module
from sparda_compile.program.captures import Captures
from sparda_compile.program.plan import Plan, forecast_shapes, make_plan
from sparda_compile.program.program import Program
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.testing import tiny_llama

if TYPE_CHECKING:
    from torch import fx

    from sparda_compile.forecast.projection import Projection

CONFIG = SpardaConfig(mode="forecast", top_k=None, block_size=16, lowering="eager", max_tokens=64)


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


def forecast_of(plan: Plan) -> dict[int, Projection]:
    graph, shapes = plan.stage("find_attention").graph, forecast_shapes(plan)
    return initial_forecast(graph, plan.sites, shapes, plan.captured, torch.float32)


def placeholders(plan: Plan) -> list[str]:
    return [node.name for node in plan.graph_module.graph.nodes if node.op == "placeholder"]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_program_takes_what_its_graph_asks_for(captures: Captures, phase: str) -> None:
    plan = plan_of(captures, phase, batch_size=2)
    program = Program(plan, forecast_of(plan))
    kv = KVCache(plan.layout, torch.device("cpu"))
    num_tokens = 1 if phase == "decode" else 5
    ids = torch.arange(2 * num_tokens).reshape(2, num_tokens)
    positions = torch.arange(num_tokens).expand(2, -1).contiguous()
    mask = None if phase == "decode" else torch.ones_like(ids, dtype=torch.bool)
    assert ("sparda_token_mask" in placeholders(plan)) == (phase == "prefill")
    assert not program.is_compiled
    logits = program(ids, positions, mask, kv)
    assert program.is_compiled
    assert logits.shape == (2, 1, 256)
    assert not logits.requires_grad
    with torch.no_grad():
        want = captures.model(ids, position_ids=positions).logits[:, -1:]
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
    assert kv.state["sparda_lengths"].tolist() == [num_tokens] * 2
    assert kv.most_past == num_tokens


def test_program_needs_the_state_that_its_graph_names(captures: Captures) -> None:
    plan = plan_of(captures, mode="query")
    kv = KVCache(plan.layout, torch.device("cpu"))
    del kv.state["sparda_lengths"]
    one = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(KeyError, match="sparda_lengths"):
        Program(plan, {})(one, one, None, kv)


def test_program_needs_every_forecast(captures: Captures) -> None:
    plan = plan_of(captures)
    with pytest.raises(KeyError):
        Program(plan, {})


def test_weights_are_the_model_s_own(captures: Captures) -> None:
    plan = plan_of(captures, mode="query")
    arguments = dict(zip(placeholders(plan), Program(plan, {})._arguments, strict=True))
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    own = {tensor.data_ptr() for tensor in captures.model.parameters()}
    assert own <= {tensor.data_ptr() for tensor in tensors}
    named = {value for value in arguments.values() if isinstance(value, str)}
    assert {"input_ids", "position_ids"} <= named
    assert named - {"input_ids", "position_ids", "batch_size"} <= set(
        KVCache(plan.layout, torch.device("cpu")).state
    )


def test_program_follows_its_model_s_joined_weights(
    captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = plan_of(captures, mode="query", machine="h200")
    monkeypatch.setattr(fuse_projections, "_on_gpu", lambda graph, ctx: True)
    plan = plan_of(captures, mode="query", machine="h200")
    assert len(JOINED.of(plan.graph_module)) == 4
    one = torch.ones(1, 1, dtype=torch.long)
    programs = [Program(p, {}) for p in (apart, plan)]
    weight = captures.model.get_parameter("model.layers.1.self_attn.v_proj.weight")
    kept = weight.detach().clone()
    logits = []
    try:
        for factor in (1.0, -3.0):
            with torch.no_grad():
                weight.mul_(factor)
            want, got = (
                program(one, one * 0, None, KVCache(program.plan.layout, torch.device("cpu")))
                for program in programs
            )
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            logits.append(got)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert not torch.allclose(*logits, atol=1e-3)


def test_programs_of_one_model_share_their_joined_weights(
    captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse_projections, "_on_gpu", lambda graph, ctx: True)
    plans = [plan_of(captures, batch_size=size, machine="h200") for size in (1, 2)]
    forecast, other = (forecast_of(plans[0]) for _ in range(2))
    programs = [Program(plan, forecast) for plan in plans]
    joined = [[weight.tensor.data_ptr() for weight in each._joined] for each in programs]
    assert joined[0] == joined[1]
    assert len(set(joined[0])) == len(joined[0]) == 4
    # Both layers' forecasts are made from the first one's input: only that copy is another.
    another = [weight.tensor.data_ptr() for weight in Program(plans[1], other)._joined]
    assert [one == two for one, two in zip(joined[0], another, strict=True)].count(False) == 1


def test_weights_are_joined_when_a_program_runs_and_go_with_it(
    captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse_projections, "_on_gpu", lambda graph, ctx: True)
    plan = plan_of(captures, mode="query", machine="h200")
    program = Program(plan, {})
    captures.refresh_joined()
    assert not any(weight._is_made for weight in program._joined)
    one = torch.ones(1, 1, dtype=torch.long)
    with torch.inference_mode():
        program(one, one * 0, None, KVCache(plan.layout, torch.device("cpu")))
    assert [weight._is_made for weight in program._joined] == [True] * 4
    captures.refresh_joined()  # outside of inference mode
    copies = [weakref.ref(weight) for weight in program._joined]
    del program
    gc.collect()
    assert not any(copy() for copy in copies)


SIZES = [(16, 0), (16, 0), (10, 0), (31, 0), (16, 1), (1, 20), (2, 40), (2, 40), (33, 0)]


@pytest.mark.parametrize(
    ("phase", "asked", "collected"),
    [
        ("decode", [(), (), ()], [(1, 0)]),
        ("prefill", SIZES, [(16, 0), (16, 1), (2, 40), (33, 0)]),
    ],
)
def test_kernels_are_collected_once_for_sizes_of_a_kind(
    captures: Captures,
    phase: str,
    asked: list[tuple[int, ...]],
    collected: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many caches a program serves: to collect them is to run it on fake tensors."""
    seen, begun = [], []

    def launches_of(graph: fx.Graph, device: torch.device, *sizes: int) -> list[Any]:
        seen.append((graph, device.type, *sizes))
        return []

    monkeypatch.setattr(program_module, "launches_of", launches_of)
    monkeypatch.setattr(program_module, "compile_ahead", lambda launches, _: begun.append(launches))
    plan = plan_of(captures, phase, batch_size=2)
    program = Program(plan, forecast_of(plan))
    gpu = type("Captured", (), {"device": torch.device("cuda:0"), "phase": phase})()
    program.plan = dataclasses.replace(plan, captured=gpu)
    for sizes in asked:
        program.compile_kernels(*sizes)
    assert seen == [(plan.graph_module.graph, "cuda", 2, *sizes) for sizes in collected]
    assert begun == [[]] * len(collected)


def test_kernels_of_a_prompt_begin_before_its_pieces(
    captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    plan = plan_of(captures, "prefill")
    program = Program(plan, forecast_of(plan))
    compile_pieces = Program.compile
    monkeypatch.setattr(Program, "compile_kernels", lambda _, *sizes: done.append(sizes))
    monkeypatch.setattr(
        Program, "compile", lambda self: (done.append("pieces"), compile_pieces(self))
    )
    kv = KVCache(plan.layout, torch.device("cpu"))
    ids = torch.ones(1, 9, dtype=torch.long)
    for turn in range(2):
        program(ids, torch.arange(9)[None] + 9 * turn, None, kv)
        kv.advance(9, 9)
    assert done == [(9, 0), "pieces", (9, 9)]
