"""A decode step never asks the device for a number: no `.item()`, at any layer or mode."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparda_compile
from sparda_compile import SpardaConfig

SMALL = {"top_k": 2, "sink_blocks": 1, "local_blocks": 1, "block_size": 16, "lowering": "eager"}


class CountSyncs(TorchDispatchMode):
    """Counts reads of a tensor's value into Python."""

    def __init__(self) -> None:
        super().__init__()
        self.num_syncs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.num_syncs += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def traced(traced_llama):
    return sparda_compile.optimize(traced_llama, SpardaConfig(mode="query", **SMALL))


@pytest.mark.parametrize("offload", ["always", "never"])
@pytest.mark.parametrize(
    ("mode", "hint"),
    [
        ("dense", "forecast"),
        ("query", "forecast"),
        ("forecast", "forecast"),
        ("exact", "forecast"),
        ("exact", "previous_step"),
        ("exact", "previous_layer"),
    ],
)
def test_decode_reads_no_value_into_python(traced, mode, hint, offload, monkeypatch):
    # Of one decode step, token ids are looked at where that waits for no device: on a CPU.
    monkeypatch.setattr("sparda_compile.module.optimized.check_ids", lambda ids, vocabulary: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = sparda_compile.optimize(
            traced, SpardaConfig(mode=mode, hint=hint, offload=offload, **SMALL)
        )
    cache = fast.new_cache(512)
    fast(torch.randint(0, 256, (2, 62)), past_key_values=cache)
    with CountSyncs() as counted:
        for _ in range(4):  # 62 to 66: a block fills and a new one begins
            fast(torch.randint(0, 256, (2, 1)), past_key_values=cache)
    assert counted.num_syncs == 0


def test_the_counter_counts():
    with CountSyncs() as counted:
        torch.ones(1).item()
    assert counted.num_syncs == 1
