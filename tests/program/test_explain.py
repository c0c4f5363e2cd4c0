"""What `explain` says of a model: sites, bytes, counts and schedules."""

from __future__ import annotations

import pytest

from sparda_compile import SpardaConfig, explain, optimize
from sparda_compile.passes import PIPELINE
from sparda_compile.program.explain import refused_report
from sparda_compile.program.plan import planned_capacity
from sparda_compile.testing import build

CONFIG = SpardaConfig(mode="query", top_k=4, sink_blocks=1, local_blocks=2, block_size=16)
NAMES = [graph_pass.name for graph_pass in PIPELINE]


@pytest.fixture(scope="module")
def model(shared_llama):
    return shared_llama


@pytest.fixture(scope="module")
def fast(traced_llama):
    return optimize(traced_llama, CONFIG)


@pytest.fixture(scope="module")
def report(fast):
    return explain(fast, CONFIG, batch_size=2, max_tokens=1024)


def test_what_it_is_for(report):
    assert (report.mode, report.batch_size, report.max_tokens) == ("query", 2, 1024)
    assert report.error == ""


def test_sites(report):
    for layer, site in enumerate(report.sites):
        assert site.layer == layer
        assert site.module == f"model.layers.{layer}.self_attn"
        assert site.projection == f"model.layers.{layer}.self_attn.q_proj"
        assert (site.form, site.kind, site.reason) == ("sdpa", "sparse", "")
        assert (site.num_heads, site.num_groups, site.head_dim) == (4, 2, 16)
        assert (site.window, site.softcap, site.position) == (0, 0.0, "rope")
        assert site.scale == pytest.approx(0.25)
    assert len(report.sites) == 2


def test_planned_bytes(report):
    blocks, selected, pages, heads = 1024 // 16, 1 + 2 + 1 + 4, 12, 2 * 2
    block_bytes = 2 * 16 * 16 * 4
    windows = (1024 - 32) // 16 + 1
    for layer in report.layers:
        assert layer.host_bytes == heads * blocks * block_bytes
        assert layer.page_bytes == heads * pages * block_bytes
        assert layer.summary_bytes == heads * (windows + 32) * 16 * 4
        assert layer.table_bytes == heads * (blocks + 2 * pages) * 4 + 6 * 8
    assert pages == selected * 3 // 2
    assert report.host_bytes == 2 * heads * blocks * block_bytes


def test_planned_bytes_are_those_that_a_cache_takes(fast, report):
    import torch

    module = optimize(fast, CONFIG.replace(max_tokens=1024, lowering="eager"))
    kv = module(torch.zeros(2, 4, dtype=torch.long)).past_key_values.kv
    assert kv.host_pool.num_bytes == report.host_bytes
    shared = kv.state["sparda_lengths"].nbytes
    assert kv.device_pool.num_bytes == report.device_bytes + shared


def test_passes(report):
    assert [(p.phase, p.name) for p in report.passes] == [
        (phase, name) for phase in ("prefill", "decode") for name in NAMES
    ]
    for before, after in zip(report.passes, report.passes[1:], strict=False):
        if before.phase == after.phase:
            assert before.after == after.before
            assert before.nodes_after == after.nodes_before
    decode = {p.name: p for p in report.passes if p.phase == "decode"}
    assert decode["find_attention"].counts == {"sites": 2, "sparse": 2, "window": 0}
    assert "kv_update" in decode["replace_attention"].before
    assert "sparse_attention" in decode["replace_attention"].after
    assert all(p.ms > 0 for p in report.passes)


def test_schedules(report, model):
    assert [s.phase for s in report.schedules] == ["decode", "prefill"]
    assert report.forecast_parameters == 0
    assert report.model_parameters == sum(p.numel() for p in model.parameters())


def test_passes_that_are_left_out(fast):
    disabled = ("insert_prefetch", "schedule_transfers")
    report = explain(fast, CONFIG.replace(disable_passes=disabled))
    assert not {p.name for p in report.passes} & set(disabled)
    assert report.schedules == ()


def test_speculation_is_said_in_a_sentence(fast):
    config = CONFIG.replace(
        mode="speculate", offload="never", machine="h200", top_k=8, speculate_where="always"
    )
    # Selected are 1 + 2 + 1 blocks, and 8 by score: of these 2, and the current one, are new.
    said = (
        "Layers that attend to up to 16 predicted blocks while they select: 2. Of 12 selected "
        "blocks 3 are expected to be repaired, and of those predicted 7 to be {} the result."
    )
    assert config.num_predicted(planned_capacity(config) // config.block_size) == 16
    for changes, text in (
        ({}, said.format("left out of")),
        ({"repair": "union"}, said.format("kept in")),
        (
            {"machine": "cpu", "speculate_where": "auto"},
            "Nothing is predicted: on cpu no layer is expected to gain by it.",
        ),
        (
            {"disable_passes": ("insert_speculation",)},
            "Nothing is predicted: disable_passes leaves insert_speculation out.",
        ),
    ):
        report = explain(fast, config.replace(**changes))
        assert report.speculation == text
        assert text in str(report)
        assert text in repr(report)
        assert text in report._repr_html_()
    assert explain(fast, CONFIG).speculation == ""
    report = explain(fast, config)
    rows = {row.op: row for row in report.schedules[0].rows}
    early, selecting = rows["sparda.attend_predicted"], rows["sparda.score_blocks"]
    assert (early.stream, early.start_us) == (3, selecting.start_us)
    assert rows["sparda.repair_predicted"].start_us > early.end_us
    table = str(report.schedules[0])
    assert "attend" in table
    assert "sparda.repair_predicted" in table


def test_window_layer_stays_dense_and_says_why():
    report = explain(build("gemma3"), CONFIG, max_tokens=512)
    (dense,), (sparse,) = report.dense_sites, report.sparse_sites
    assert (dense.layer, dense.kind, dense.window) == (0, "window", 16)
    assert "sliding window of 16 tokens" in dense.reason
    assert sparse.layer == 1
    window = next(layer for layer in report.layers if layer.layer == 0)
    assert (window.host_bytes, window.summary_bytes, window.table_bytes) == (0, 0, 0)
    assert window.page_bytes == 2 * 2 * 16 * 16 * 4


def test_refusal(model):
    report = refused_report(model, CONFIG, 2, 1024, "No attention.")
    assert (report.model, report.error) == ("LlamaForCausalLM", "No attention.")
    assert (report.sites, report.layers, report.passes, report.schedules) == ((), (), (), ())
    assert report.model_parameters == sum(p.numel() for p in model.parameters())
