"""`KVCache` itself; what its ops do to it is in test_state_machine.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.errors import (
    DevicePoolFullError,
    HostPoolFullError,
    KVCacheError,
    UnsupportedInputError,
)
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.runtime import kv_cache
from sparda_compile.runtime.append import advance_lengths, extend_kv
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.runtime.numa import ANYWHERE, Placement
from sparda_compile.runtime.stats import LayerStats
from sparda_compile.runtime.transfer import store_blocks
from sparda_compile.state.layout import CacheLayout, LayerShape

LAYERS = (
    LayerShape(0, "sparse", 2, 4, 0, torch.float32),
    LayerShape(2, "window", 2, 4, 5, torch.float32),
)
BLOCK_BYTES = 2 * 16 * 4 * 4


def make(max_tokens=64, batch_size=2, **config):
    settings = {
        "mode": "query", "selector": "quest", "block_size": 16, "pool_size": 8, "pool_stride": 4,
        "local_blocks": 1, "top_k": 1, **config,
    }  # fmt: skip
    layout = CacheLayout(SpardaConfig(**settings), LAYERS, batch_size, max_tokens)
    return KVCache(layout, torch.device("cpu"))


def larger(kv, max_tokens):
    return dataclasses.replace(kv.layout, max_tokens=max_tokens)


def fill(kv, token_counts):
    """Put random tokens into layer 0; return them, [2, B, G, T, D]."""
    state = {n.removeprefix("sparda_").removesuffix("_0"): t for n, t in kv.state.items()}
    width = max(token_counts)
    new = torch.randn(2, len(token_counts), 2, width, 4)
    mask = torch.arange(width) < torch.tensor(token_counts)[:, None]
    tables = (state["block_table"], state["page_block"], state["page_stamp"])
    tokens = number_tokens(mask, state["lengths"])
    extend_kv(*new, None, tokens, state["lengths"], state["pages"], *tables, 1, 1, "lru")
    store_blocks(
        list(new), None, tokens, state["lengths"], tables[0], state["pages"], state["host"],
        state["counters"],
    )  # fmt: skip
    advance_lengths(mask, state["lengths"])
    kv.advance(width, width)
    return new


def test_new_cache_is_empty():
    kv = make()
    assert kv.lengths() == [0, 0]
    assert (kv.num_columns, kv.longest) == (0, 0)
    assert kv.state["sparda_block_table_0"].eq(-1).all()
    assert kv.state["sparda_key_bounds_0"][..., 0, :].eq(float("inf")).all()
    assert kv.stats().total == LayerStats(0, 0, 0, 0)
    assert kv.host_pool.num_bytes == kv.layout.num_bytes(on_host=True)
    assert kv.device_pool.num_bytes == kv.layout.num_bytes(on_host=False)


def test_blocks_in_cpu_memory_are_their_own_input_on_the_cpu():
    kv = make()
    assert set(kv.host_blocks) == {"sparda_host_0"}
    assert kv.state["sparda_host_0"] is kv.host_blocks["sparda_host_0"]
    assert make(offload="never").state["sparda_host_0"].shape == (0,)


@pytest.mark.parametrize("shape", [(3, 2, 5, 2, 16, 4), (1, 1, 1, 2, 16, 4)])
def test_another_device_takes_the_address_of_each_row_and_group(monkeypatch, shape):
    """The device is made up, as far as asking it goes; addresses stay on the CPU."""
    device = Elsewhere()
    blocks = torch.zeros(shape, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, where: (tensor, where))
    addresses, where = kv_cache._as_input(blocks, device)
    assert where is device
    assert addresses.dtype == torch.int64
    rows = [[blocks[b, g].data_ptr() for g in range(shape[1])] for b in range(shape[0])]
    assert addresses.tolist() == rows
    nothing, where = kv_cache._as_input(torch.zeros(0), device)
    assert (nothing.shape, where) == ((0,), device)


class Elsewhere:
    """A device that is not the CPU."""

    type = "cuda"


def test_a_gpu_is_asked_before_anything_is_allocated(monkeypatch):
    asked = []

    def refuse(device):
        asked.append(device)
        raise UnsupportedInputError("cannot read CPU memory")

    def check(*_):
        raise DevicePoolFullError("asked too late")

    layouts = [make(offload=offload).layout for offload in ("always", "never")]
    monkeypatch.setattr(kv_cache, "check_host_access", refuse)
    monkeypatch.setattr(kv_cache.DevicePool, "check", check)
    gpu = torch.device("cuda:0")
    with pytest.raises(UnsupportedInputError):
        KVCache(layouts[0], gpu)
    assert asked == [gpu]
    # What stays on the device needs no such GPU.
    with pytest.raises(DevicePoolFullError, match="asked too late"):
        KVCache(layouts[1], gpu)
    assert asked == [gpu]


def test_blocks_in_cpu_memory_are_near_the_gpu_that_reads_them(monkeypatch):
    places, near = [], Placement("near it", frozenset({0}))
    layouts = [make(offload=offload).layout for offload in ("always", "never")]

    def pool(limit, *, pinned, place):
        places.append((pinned, place))
        raise DevicePoolFullError("far enough")

    monkeypatch.setattr(kv_cache, "check_host_access", lambda device: None)
    monkeypatch.setattr(kv_cache, "placement_near", lambda device: near)
    monkeypatch.setattr(kv_cache, "HostPool", pool)
    for layout, device in ((layouts[0], "cuda:0"), (layouts[1], "cuda:0"), (layouts[0], "cpu")):
        with pytest.raises(DevicePoolFullError, match="far enough"):
            KVCache(layout, torch.device(device))
    assert places == [(True, near), (True, ANYWHERE), (False, ANYWHERE)]


def test_reset_forgets_all_and_keeps_the_memory():
    kv = make()
    addresses = {name: tensor.data_ptr() for name, tensor in kv.state.items()}
    fill(kv, [40, 20])
    kv.state["sparda_key_bounds_0"].fill_(3.0)
    kv.reset()
    fresh = make()
    assert {name: tensor.data_ptr() for name, tensor in kv.state.items()} == addresses
    for name, tensor in kv.state.items():
        if "host" not in name:
            assert torch.equal(tensor, fresh.state[name]), name
    assert (kv.num_columns, kv.longest) == (0, 0)


@pytest.mark.parametrize("offload", ["always", "never"])
def test_sequences_take_over_what_others_hold(offload):
    kv = make(batch_size=6, offload=offload)  # as many as there are counters
    fill(kv, [40, 20, 33, 7, 1, 9])
    addresses = {name: tensor.data_ptr() for name, tensor in kv.state.items()}
    before = {name: tensor.clone() for name, tensor in kv.state.items()}
    kv.state["sparda_counters_0"].copy_(torch.arange(6))
    rows = torch.tensor([1, 1, 4, 0, 4, 5])
    kv.reorder(rows)
    assert {name: tensor.data_ptr() for name, tensor in kv.state.items()} == addresses
    assert kv.state.pop("sparda_counters_0").tolist() == [0, 1, 2, 3, 4, 5]
    assert kv.lengths() == [20, 20, 1, 40, 1, 9]
    for name, tensor in kv.state.items():
        want = before[name][rows] if tensor.numel() else before[name]
        torch.testing.assert_close(tensor, want, rtol=0, atol=0, equal_nan=True, msg=name)


def test_addresses_of_blocks_in_cpu_memory_stay():
    kv = make()
    fill(kv, [40, 40])
    blocks = kv.host_blocks["sparda_host_0"]
    addresses = kv.state["sparda_host_0"] = torch.tensor([[1, 2], [3, 4]])
    first = blocks[0].clone()
    kv.reorder(torch.tensor([0, 0]))
    assert addresses.tolist() == [[1, 2], [3, 4]]
    assert torch.equal(blocks[1][:, :2], first[:, :2])


def test_room_is_that_of_the_longest_sequence():
    kv = make()
    kv.advance(60, 50)
    kv.check_room(14)
    with pytest.raises(KVCacheError, match=r"15 more tokens .* holds 50 .* reserved for 64"):
        kv.check_room(15)


def test_most_past_counts_what_was_issued_until_it_is_known():
    kv = make()
    assert kv.most_past == 0
    kv.issue(20)
    kv.issue(10)
    assert kv.most_past == 30
    kv.advance(30, 17)
    assert kv.most_past == kv.longest == 17
    kv.issue(40)
    assert kv.grow(dataclasses.replace(kv.layout, max_tokens=128)).most_past == 57
    kv.issue(40)
    assert kv.most_past == 64, "there is no room for more"
    kv.reset()
    assert kv.most_past == 0


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"device_bytes": 1 << 10}, DevicePoolFullError, "2 sequences of 64 tokens"),
        ({"host_bytes": 1 << 10}, HostPoolFullError, "2 sequences of 64 tokens"),
    ],
)
def test_pools_that_are_too_small_are_found_at_once(config, error, message):
    with pytest.raises(error, match=message):
        make(**config)


def test_stats_are_bytes_of_whole_blocks_of_sparse_layers():
    kv = make()
    kv.state["sparda_counters_0"].copy_(torch.tensor([7, 5, 4, 2, 3, 0]))
    stats = kv.stats()
    assert stats.layers == {0: LayerStats(7, 5, 6 * BLOCK_BYTES, 3 * BLOCK_BYTES)}
    kv.reset_stats()
    assert kv.stats().total == LayerStats(0, 0, 0, 0)


def test_nothing_is_copied_to_the_device_that_stays_there():
    kv = make(offload="never")
    kv.state["sparda_counters_0"].copy_(torch.tensor([7, 5, 4, 2, 0, 0]))
    assert kv.stats().total.h2d_bytes == 0


@pytest.mark.parametrize("offload", ["always", "never"])
def test_growth_keeps_every_tensor(offload):
    kv = make(offload=offload)
    fill(kv, [40, 20])
    for name in ("ring_k_2", "ring_v_2"):
        kv.state[f"sparda_{name}"].normal_()
    grown = kv.grow(larger(kv, 160))
    assert grown.layout.max_tokens == 160
    assert grown.lengths() == [40, 20]
    assert (grown.num_columns, grown.longest) == (40, 40)
    fresh = make(160, offload=offload)
    for name, old in kv.state.items():
        new, empty = grown.state[name].clone(), fresh.state[name]
        assert new.shape == empty.shape
        kept = tuple(slice(0, size) for size in old.shape)
        assert torch.equal(new[kept], old), name
        new[kept] = empty[kept]
        assert torch.equal(new, empty), name


@pytest.mark.parametrize("token_counts", [[40, 20], [32, 5], [48, 48]])
def test_growth_past_the_device_limit_moves_blocks_to_the_host(token_counts):
    kv = make(offload="auto", device_bytes=30_000)
    assert not kv.layout.offload
    tokens = fill(kv, token_counts)
    grown = kv.grow(larger(kv, 1024))
    assert grown.layout.offload
    assert grown.layout.num_pages < grown.layout.num_blocks
    state = grown.state
    assert grown.lengths() == token_counts
    for row, length in enumerate(token_counts):
        for group in range(2):
            for block in range(length // 16):
                want = tokens[:, row, group, 16 * block : 16 * block + 16]
                assert torch.equal(state["sparda_host_0"][row, group, block], want)
            resident = state["sparda_block_table_0"][row, group].ge(0).nonzero().flatten().tolist()
            assert resident == ([length // 16] if length % 16 else [])
            for block in resident:
                page = state["sparda_block_table_0"][row, group, block]
                assert state["sparda_page_block_0"][row, group, page] == block
                want = tokens[:, row, group, 16 * block : length]
                got = state["sparda_pages_0"][row, group, page, :, : length % 16]
                assert torch.equal(got, want)
