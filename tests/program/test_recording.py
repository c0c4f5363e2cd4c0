"""What a run's recording holds."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.graph.nodes import is_sparda
from sparda_compile.isa.engines import ImmediateEngine, use_engine
from sparda_compile.isa.streams import ATTEND, COMPUTE, COPY, SELECT
from sparda_compile.program.recording import Record, record_run
from sparda_compile.program.run_proof import check_recording

SMALL = {
    "block_size": 16, "pool_size": 8, "pool_stride": 4, "top_k": 2, "local_blocks": 1,
    "max_tokens": 512, "machine": "h200", "lowering": "eager", "mode": "forecast",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(shared_llama):
    return recorded(shared_llama)


def recorded(model, **settings):
    """Return a decode program, the logits of one step and its recording."""
    fast = optimize(model, SpardaConfig(**{**SMALL, **settings}))
    cache = fast.new_cache()
    fast(torch.arange(2, 92)[None], past_key_values=cache)
    program = fast.programs.get("decode", 1, 512, last_only=True)
    call = {"input_ids": torch.tensor([[7]]), "position_ids": torch.tensor([[90]]),
            "batch_size": 1, "num_tokens": 1}  # fmt: skip
    with use_engine(ImmediateEngine()):
        logits, recording = record_run(program.lowered, program._bound(call, cache.kv))
    return program, logits, recording


def test_every_op_is_recorded_in_order(run):
    program, logits, recording = run
    nodes = [n.name for n in program.plan.graph_module.graph.nodes if is_sparda(n)]
    assert [r.name for r in recording.records if r.node is not None] == nodes
    assert logits.shape[:2] == (1, 1)
    assert recording.state["sparda_pages_0"] != recording.state["sparda_pages_1"] != 0


def test_streams_and_events_are_those_of_the_calls(run):
    _, _, recording = run
    by_name = {record.name: record for record in recording.records}
    prefetch = by_name["prefetch_1"]
    assert (prefetch.stream, prefetch.streams) == (COPY, [COPY])
    ((event, stream),) = prefetch.starts
    assert stream == COPY
    waits = [r for r in recording.records if (event, COMPUTE) in r.waits]
    assert len(waits) == 1
    assert waits[0].stream == COMPUTE
    assert by_name["select_pages_1"].stream == SELECT
    assert by_name["sparse_attention_1"].stream == COMPUTE


def test_what_is_read_written_and_let_go_of(run):
    _, _, recording = run
    by_name = {record.name: record for record in recording.records}
    append = by_name["append_kv_1"].accesses()
    assert append[recording.state["sparda_pages_1"]] is True
    assert append[recording.state["sparda_lengths"]] is False
    assert by_name["fork_1"].accesses() == {}
    freed = [storage for record in recording.records for storage in record.frees]
    assert freed
    assert not set(freed) & set(recording.state.values())
    piece = next(record for record in recording.records if record.node is None)
    assert any(piece.accesses().values())


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("before_repair", ["always", "auto"])
def test_what_a_step_does_not_need_runs_beside_it(shared_llama, lowering, before_repair):
    """A Forecast's projection on the select stream, the update of a prediction on attend's."""
    settings = {"mode": "exact", "hint": ("ema", "forecast"), "lowering": lowering}
    program, _, recording = recorded(shared_llama, attend_before_repair=before_repair, **settings)
    assert check_recording(program.plan.graph_module.graph, recording).storages > 0
    wanted = {"forecast_piece": [SELECT], "update_prediction": [ATTEND], "scores": [COMPUTE]}
    for name, streams in wanted.items():
        mine = [r for r in recording.records if re.fullmatch(rf"{name}_\d", r.name)]
        assert [record.streams for record in mine] == [streams] * 2
    # No piece of the compute stream has a Forecast's weights.
    weights = {recording.state[f"sparda_forecast_{layer}"] for layer in (0, 1)}
    takers = [r for r in recording.records if weights & {*itertools.chain(*r.takes.values())}]
    assert {r.name for r in takers if r.stream == COMPUTE} == {"forecast_fork_0", "forecast_fork_1"}


def test_the_stream_of_what_only_waits_is_that_of_the_wait():
    assert Record("nothing", None).stream == COMPUTE
    assert Record("waits", None, waits=[(3, COPY)]).stream == COPY
    assert Record("works", None, streams=[SELECT], waits=[(3, COPY)]).stream == SELECT
