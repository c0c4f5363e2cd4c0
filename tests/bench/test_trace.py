"""Selection that follows a trace: by a selector that wraps another, in every mode."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.bench.synthetic import trace_steps_of
from sparda_compile.bench.trace import TRACE, following
from sparda_compile.capture.causal_lm import as_causal_lm, sliding_windows
from sparda_compile.graph.nodes import find_ops
from sparda_compile.kernels.select_blocks import select_blocks
from sparda_compile.program.captures import Captures
from sparda_compile.program.plan import make_plan
from sparda_compile.program.program import Program
from sparda_compile.registry import SELECTORS
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.selectors import Geometry
from sparda_compile.testing import tiny_llama

SETTINGS = {"block_size": 16, "lowering": "eager", "max_tokens": 64, "top_k": None}


@pytest.fixture(scope="module")
def captures():
    model = tiny_llama(hidden_size=48)
    return Captures(as_causal_lm(model), sliding_windows(model))


def plan_of(captures, steps, **settings):
    config = following(SpardaConfig(**{**SETTINGS, **settings}), steps)
    return make_plan(captures, "decode", config, batch_size=1, max_tokens=64)


def sample(name, num_blocks=37):
    """Return a query, the tensors of a summary and lengths; the trace, if any, names nothing."""
    selector, generator = SELECTORS[name], torch.Generator().manual_seed(0)
    geometry = Geometry(num_blocks, 16, 8, 4, 5, 2, 3)
    tensors = [
        torch.zeros(2, 3, *size, dtype=selector.summary.dtypes[key])
        if key in selector.summary.dtypes else torch.randn(2, 3, *size, generator=generator)
        for key, size in selector.summary.shapes(geometry, 20).items()
    ]  # fmt: skip
    heads = 3 if "forecast" in name else 6
    query = torch.randn(2, heads, 1, 20, generator=generator)
    lengths = torch.tensor([num_blocks * 16 - 1, num_blocks * 8], dtype=torch.int32)
    return query, tensors, lengths, geometry


@pytest.mark.parametrize(
    "base", ["infllm2", "quest", "forecast", "nosa", "nosa_forecast", "lowbit2"]
)
def test_what_is_named_for_the_step_of_each_row_is_best(base):
    query_selector = base.removesuffix("_forecast") if base != "forecast" else "infllm2"
    following(SpardaConfig(selector=query_selector, short_list=5), 10)
    name = f"{base}_following_10"
    query, tensors, lengths, geometry = sample(name)
    score = SELECTORS[name].score
    plain = SELECTORS[base].score(query, tensors[:-1], lengths, 0.2, geometry)
    assert torch.equal(score(query, tensors, lengths, 0.2, geometry), plain)
    # Lengths 591 and 296: rows 0 and 1 are at steps 1 and 6 of 10.
    trace = tensors[-1]
    trace[0, :, 1, [4, 20, 36]] = True
    trace[1, 2, 6, 36] = True
    trace[0, :, 6] = trace[1, :, 1] = True
    before = trace.clone()
    got = score(query, tensors, lengths, 0.2, geometry)
    named = torch.zeros_like(plain, dtype=torch.bool)
    named[0, :, [4, 20, 36]] = True
    named[1, 2, 36] = True
    assert torch.equal(got[~named], plain[~named])
    assert (got[named] > plain[plain.isfinite()].max()).all()
    assert got[named].isfinite().all()
    assert torch.equal(trace, before)
    ids = select_blocks(got, lengths, 8, 16, 1, 1)
    assert {4, 20, 36} <= set(ids[0, 0].tolist())


def test_summary_takes_in_keys_and_leaves_the_trace(captures):
    del captures
    config = following(SpardaConfig(), 3)
    summary = SELECTORS[config.selector].summary
    geometry = Geometry.of(config, 4)
    tensors = [
        torch.ones(1, 2, *size, dtype=summary.dtypes.get(name, torch.float32))
        for name, size in summary.shapes(geometry, 8).items()
    ]
    summary.reset(tensors)
    assert not any(tensor.any() for tensor in tensors)
    tensors[-1][:] = True
    keys = torch.randn(1, 2, 40, 8)
    summary.extend(tensors, keys, torch.zeros(1, dtype=torch.int32), torch.ones(1, 40).bool(),
                   geometry)  # fmt: skip
    assert tensors[0][:, :, 0].any()
    assert tensors[-1].all()


def test_a_configuration_follows_once_for_each_number_of_steps():
    config = SpardaConfig(mode="query")
    assert following(config, 7) == following(config, 7)
    assert following(config, 7).selector != following(config, 8).selector
    assert following(config, 0) is config
    dense = SpardaConfig(mode="dense")
    assert following(dense, 7) is dense


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "forecast"},
        {"mode": "exact"},
        {"mode": "exact", "selector": "quest"},
        {"mode": "query"},
        {"mode": "query", "selector": "lowbit2", "kv_format": "values8"},
        {"mode": "query", "selector": "lowbit4", "kv_format": "values8"},
    ],
)
def test_a_plan_is_that_of_a_program_without_a_trace(captures, settings):
    plain, followed = (plan_of(captures, steps, **settings) for steps in (0, 500))
    names = [[node.name for node in plan.graph_module.graph.nodes if node.op != "placeholder"]
             for plan in (plain, followed)]  # fmt: skip
    assert names[0] == names[1]
    assert [row.end_us for row in plain.schedule.rows] == [
        row.end_us for row in followed.schedule.rows
    ]
    assert trace_steps_of(plain.layout) == 0
    assert trace_steps_of(followed.layout) == 500
    spec = followed.layout.tensors(followed.layout.layers[0])[TRACE]
    assert (spec.shape, spec.dtype) == ((1, 2, 500, 4), torch.bool)
    scored = {node.args[3] for node in find_ops(followed.graph_module.graph, "score_blocks")}
    assert all(name.endswith("_following_500") for name in scored)


def test_a_program_reads_the_blocks_that_its_trace_names(captures):
    plan = plan_of(captures, 2, mode="query", top_k=1, sink_blocks=0, local_blocks=0)
    kv = KVCache(plan.layout, torch.device("cpu"))
    kv.state["sparda_lengths"].fill_(50)
    trace = kv.state["sparda_trace_1"]
    trace[:, 0, 0, 1] = trace[:, 1, 0, 2] = trace[:, :, 1, 0] = True
    one = torch.ones(1, 1, dtype=torch.long)
    program = Program(plan, {})
    for step, blocks in enumerate([({1}, {2}), ({0}, {0})]):
        program(one, one * (50 + step), None, kv)
        for group, named in enumerate(blocks):
            stamps = kv.state["sparda_page_stamp_1"][0, group]
            touched = kv.state["sparda_page_block_1"][0, group][stamps == 50 + step]
            assert set(touched.tolist()) == {3} | named
