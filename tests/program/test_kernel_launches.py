"""What a decode step will launch, found on fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import sparda_compile
from sparda_compile import SpardaConfig
from sparda_compile.program.kernel_launches import launches_of

CONFIG = SpardaConfig(
    top_k=2, local_blocks=1, block_size=16, pool_size=8, pool_stride=4, machine="h200",
    offload="always", lowering="eager", mode="query",
)  # fmt: skip
ALWAYS = {"_select_pages", "_append_kv", "_append_pooled_keys", "_partials"}
COPIES = {"_gather", "_store_tail"}
INFLLM2 = {"_infllm2_logits", "_infllm2_blocks"}
CASES = {
    "query": ({}, {*ALWAYS, *COPIES, *INFLLM2}),
    "forecast": ({"mode": "forecast"}, {*ALWAYS, *COPIES, "_score_forecast"}),
    "exact": (
        {"mode": "exact", "hint": "previous_step"}, {*ALWAYS, *COPIES, *INFLLM2, "_merge"}
    ),
    "ema": (
        {"mode": "exact", "hint": "ema"},
        {*ALWAYS, *COPIES, *INFLLM2, "_merge", "_predict_blocks", "_update_prediction"},
    ),
    "quest": (
        {"selector": "quest"},
        {*ALWAYS, *COPIES, "_score_quest", "_append_key_bounds"} - {"_append_pooled_keys"},
    ),
    "resident": ({"offload": "never"}, {*ALWAYS, *INFLLM2}),
}  # fmt: skip


@pytest.fixture
def found(traced_llama, monkeypatch):
    # The kernels' own wrappers run; only the device that they ask for is not there.
    monkeypatch.setattr(FakeTensor, "is_cuda", True, raising=False)

    def of(batch_size=1, max_tokens=512, **settings):
        fast = sparda_compile.optimize(traced_llama, CONFIG.replace(**settings))
        program = fast.programs.get("decode", batch_size, max_tokens, last_only=True)
        return launches_of(program.plan.graph_module.graph, batch_size, torch.device("cpu"))

    return of


@pytest.mark.parametrize("case", CASES)
def test_kernels_of_a_mode(found, case):
    settings, names = CASES[case]
    assert {launch.kernel.__name__ for launch in found(**settings)} == names


def test_sizes_are_those_of_the_cache(found):
    for batch_size, max_tokens in ((1, 512), (3, 512), (3, 4096)):
        (select,) = (
            it for it in found(batch_size, max_tokens) if it.kernel.__name__ == "_select_pages"
        )
        scores, lengths = select.args[:2]
        assert scores.shape == (batch_size, 2, max_tokens // 16)
        assert lengths.shape == (batch_size,)
        assert select.grid == (batch_size * 2,)


def test_layers_launch_the_same(found):
    launches = found()
    assert len(launches) == len({launch.kernel for launch in launches})


def test_splits_are_those_of_the_batch(found):
    for batch_size, several in ((1, True), (4096, False)):
        launches = found(batch_size, 4096, mode="exact", hint="previous_step", top_k=64)
        (merge,) = (it for it in launches if it.kernel.__name__ == "_merge")
        assert merge.args[0].shape[:2] == (batch_size, 2)
        assert (merge.args[0].shape[2] > 1) == several
