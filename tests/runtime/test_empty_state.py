"""What a cache holds when no token is there, put back with few launches."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparda_compile import SpardaConfig
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.state.layout import CacheLayout, LayerShape


class Ops(TorchDispatchMode):
    """Notes which ops run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def cache(num_layers, **config):
    settings = {
        "mode": "query", "block_size": 16, "pool_size": 8, "pool_stride": 4, "local_blocks": 1,
        "top_k": 1, **config,
    }  # fmt: skip
    sparse = [LayerShape(i, "sparse", 2, 4, 0, torch.bfloat16) for i in range(num_layers)]
    window = LayerShape(num_layers, "window", 2, 4, 5, torch.float32)
    layout = CacheLayout(SpardaConfig(**settings), (*sparse, window), 2, 64)
    return KVCache(layout, torch.device("cpu"))


CONFIGS = [
    {"offload": "always"},
    {"offload": "never", "selector": "quest"},
    {"mode": "exact", "hint": "previous_step", "offload": "always"},
    {"mode": "exact", "hint": "ema", "offload": "always"},
    {"mode": "forecast", "selector": "lowbit2", "offload": "always"},
    {"mode": "dense"},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_cache_is_as_new(config):
    used, new = cache(3, **config), cache(3, **config)
    addresses = {name: tensor.data_ptr() for name, tensor in used.state.items()}
    on_device = used.state.keys() - used.host_blocks.keys()
    for name in on_device:
        used.state[name].fill_(7)
    used.reset()
    for name in on_device:
        assert torch.equal(used.state[name], new.state[name]), name
    assert {name: tensor.data_ptr() for name, tensor in used.state.items()} == addresses


@pytest.mark.parametrize("config", CONFIGS)
def test_a_reset_is_as_few_calls_for_many_layers_as_for_few(config):
    counts = []
    for num_layers in (1, 8):
        kv = cache(num_layers, **config)
        with Ops() as ops:
            kv.reset()
        assert set(ops.names) <= {"_foreach_zero_", "_foreach_copy_"}
        counts.append(len(ops.names))
    assert counts[0] == counts[1] <= 7


def test_layers_that_are_alike_share_what_is_copied():
    kv = cache(8, selector="quest")
    for targets, sources in kv._empty._others.values():
        assert len({source.data_ptr() for source in sources}) < len(targets)
