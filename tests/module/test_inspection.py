"""`fast.sparda`: graphs by stage, schedules, counts."""

from __future__ import annotations

import gc

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import ConfigError, KVCacheError, UnsupportedInputError
from sparda_compile.graph.nodes import find_ops
from sparda_compile.passes import PIPELINE
from sparda_compile.sizes import SAMPLES

CONFIG = SpardaConfig(mode="query", top_k=1, block_size=16, max_tokens=256, lowering="eager")


@pytest.fixture(scope="module")
def fast(traced_llama):
    return optimize(traced_llama, CONFIG)


def run(module, length=20):
    module(torch.zeros(1, length, dtype=torch.long))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_graph_after_each_pass(fast, phase):
    stages = ["capture", *(graph_pass.name for graph_pass in PIPELINE)]
    graphs = [fast.sparda.graph(phase, after=stage) for stage in stages]
    assert len({id(graph) for graph in graphs}) == len(stages)
    markers = [len(find_ops(graph.graph, "kv_update")) for graph in graphs]
    assert markers == [2, 2, *[0] * (len(stages) - 2)]
    assert fast.sparda.graph(phase) is graphs[-1]


def test_unknown_phase_and_stage(fast):
    with pytest.raises(UnsupportedInputError, match=r"'warmup' .* prefill, sparse_prefill, decode"):
        fast.sparda.graph("warmup")
    with pytest.raises(ConfigError, match=r"'fuse' .* capture, find_attention"):
        fast.sparda.graph("decode", after="fuse")
    with pytest.raises(UnsupportedInputError, match="'warmup'"):
        fast.sparda.schedule("warmup")


def test_schedule(fast):
    schedule = fast.sparda.schedule("decode")
    assert (schedule.phase, schedule.machine) == ("decode", "cpu")
    assert fast.sparda.schedule("prefill").phase == "prefill"


@pytest.mark.parametrize(
    "changes",
    [
        {"disable_passes": ("schedule_transfers",)},
        {"disable_passes": ("insert_prefetch", "schedule_transfers")},
    ],
)
def test_schedule_that_was_left_out(fast, changes):
    module = optimize(fast, CONFIG.replace(**changes))
    with pytest.raises(UnsupportedInputError, match="disable_passes"):
        module.sparda.schedule("decode")


def test_graph_is_of_the_capacity_that_ran_last_and_of_any_batch(fast):
    module = optimize(fast, CONFIG.replace(max_tokens=None))
    sizes = []
    for num_tokens in (5, 900):
        module(torch.zeros(2, num_tokens, dtype=torch.long))
        graph = module.sparda.graph("prefill").graph
        table = next(n for n in graph.nodes if n.name == "sparda_block_table_0")
        sizes.append(tuple(table.meta["val"].shape))
    assert [size[0] for size in sizes] == [SAMPLES.batch] * 2
    assert sizes[0][2] < sizes[1][2]


def test_counts(fast):
    module = optimize(fast, CONFIG)
    for ask in (module.sparda.stats, module.sparda.reset_stats):
        with pytest.raises(KVCacheError, match=r"nothing has run yet; call generate"):
            ask()
    module.generate(torch.zeros(1, 40, dtype=torch.long), max_new_tokens=5, do_sample=False)
    stats = module.sparda.stats()
    assert set(stats.layers) == {0, 1}
    assert stats.total.hits + stats.total.misses == sum(
        layer.hits + layer.misses for layer in stats.layers.values()
    )
    # Three blocks exist, and each step and KV head of either layer selects all of them.
    assert stats.total.hits + stats.total.misses == 2 * 4 * 2 * 3
    assert "hits" in str(stats)
    module.sparda.reset_stats()
    total = module.sparda.stats().total
    assert (total.hits, total.misses, total.h2d_bytes, total.d2h_bytes) == (0, 0, 0, 0)
    assert total.hit_rate == 1.0


def test_compilations_and_captures_are_counted(fast):
    module = optimize(fast, CONFIG)
    assert module.sparda.num_compilations == {"prefill": 0, "decode": 0}
    run(module)
    run(module, 37)
    assert module.sparda.num_compilations == {"prefill": 1, "decode": 0}
    run(module, 1)
    assert module.sparda.num_compilations == {"prefill": 1, "decode": 1}
    assert module.sparda.num_captures == fast.sparda.num_captures >= 2


def test_view_does_not_keep_the_module_alive(fast):
    view = optimize(fast, CONFIG).sparda
    gc.collect()
    with pytest.raises(UnsupportedInputError, match="keep a reference"):
        view.graph("decode")
