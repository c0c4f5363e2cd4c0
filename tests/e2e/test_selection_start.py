"""Where `selection_starts_at` says that selection begins, a step really leaves out its first block.

Up to there a module computes what the original model does; one token later it does not.
"""

from __future__ import annotations

import logging

import pytest
import torch

from sparda_compile import SpardaConfig, explain, optimize
from sparda_compile.config import round_up

SMALL = {"block_size": 16, "sink_blocks": 1, "local_blocks": 2, "top_k": 2, "lowering": "eager"}
NUM_GROUPS = 2


def selected_blocks(fast, ids, length, cache):
    """Take the step that makes a sequence `length` long; return its logits and blocks per group."""
    fast.sparda.reset_stats()
    out = fast(ids[:, length - 1 : length], past_key_values=cache)
    counts = {stats.hits + stats.misses for stats in fast.sparda.stats().layers.values()}
    (count,) = counts
    assert count % (NUM_GROUPS * len(ids)) == 0
    return out.logits[:, -1], count // (NUM_GROUPS * len(ids))


def around(config, traced, model, batch=1):
    """Yield (length, blocks there are, blocks read, difference of logits) around the edge."""
    edge = config.selection_starts_at
    ids = torch.randint(1, 256, (batch, edge + 2), generator=torch.manual_seed(0))
    capacity = round_up(edge + 100, config.block_size)
    fast = optimize(traced, config.replace(max_tokens=capacity))
    cache = fast.new_cache()
    fast(ids[:, : edge - 3], past_key_values=cache)
    with torch.no_grad():
        truth = model(ids).logits
    for length in range(edge - 2, edge + 3):
        logits, count = selected_blocks(fast, ids, length, cache)
        there = -(-length // config.block_size)
        yield length, there, count, float((logits - truth[:, length - 1]).abs().max())


@pytest.mark.filterwarnings("ignore:Forecast weights are not trained")
@pytest.mark.parametrize("mode", ["query", "forecast", "exact"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"selector": "quest"},
        {"selector": "lowbit2"},
        {"local_blocks": 0},
        {"sink_blocks": 0, "top_k": 0},
    ],
    ids=["infllm2", "quest", "lowbit2", "no local blocks", "local blocks alone"],
)
def test_a_block_is_left_out_from_there_on(traced_llama, shared_llama, mode, changes):
    config = SpardaConfig(mode=mode, **SMALL | changes)
    found = list(around(config, traced_llama, shared_llama, batch=2))
    edge = config.selection_starts_at
    assert [length for length, *_ in found] == list(range(edge - 2, edge + 3))
    for length, there, count, difference in found:
        is_all = length < edge
        assert (count == there) == is_all
        assert (difference < 1e-4) == is_all, (length, difference)


@pytest.mark.parametrize("changes", [{"mode": "dense"}, {"mode": "query", "top_k": None}])
def test_nothing_is_ever_left_out(traced_llama, shared_llama, changes):
    config = SpardaConfig(**SMALL | changes)
    assert config.selection_starts_at is None
    ids = torch.randint(1, 256, (1, 200), generator=torch.manual_seed(0))
    fast = optimize(traced_llama, config)
    cache = fast.new_cache(max_tokens=208)
    fast(ids[:, :-1], past_key_values=cache)
    with torch.no_grad():
        truth = shared_llama(ids).logits[:, -1]
    torch.testing.assert_close(fast(ids[:, -1:], past_key_values=cache).logits[:, -1], truth)


def test_default_configuration_reads_everything_up_to_6144_tokens(traced_llama, shared_llama):
    config = SpardaConfig(mode="query", lowering="eager")
    steps = around(config, traced_llama, shared_llama)
    found = {length: (count, there) for length, there, count, _ in steps}
    assert found == {
        6143: (96, 96), 6144: (96, 96), 6145: (96, 97), 6146: (96, 97), 6147: (96, 97)
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["query", "dense"])
def test_explain_stats_and_the_log_say_so(traced_llama, shared_llama, mode, caplog):
    config = SpardaConfig(mode=mode, **SMALL)
    words = "begins at 97 tokens" if mode == "query" else "mode dense reads all blocks"
    report = explain(traced_llama, config)
    assert words in report.selection
    assert words in str(report)
    assert words in repr(report)
    assert report.to_dict()["selection_starts_at"] == (97 if mode == "query" else None)
    with caplog.at_level(logging.INFO, "sparda_compile"):
        fast = optimize(traced_llama, config)
    assert sum(words in record.getMessage() for record in caplog.records) == 1
    fast(torch.ones(1, 20, dtype=torch.long))
    assert words in str(fast.sparda.stats())
    assert words in repr(fast.sparda.stats())
