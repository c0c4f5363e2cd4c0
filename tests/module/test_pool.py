"""Memory of a cache that is gone serves the next one of its sizes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.module import pool as pool_module
from sparda_compile.module.pool import CachePool
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.state.layout import CacheLayout, LayerShape

CPU = torch.device("cpu")


class Holder:
    """Stands for what a caller holds."""

    def hold(self, kv):
        self.held = [kv]
        return self.held


@pytest.fixture
def layout():
    shape = LayerShape(0, "sparse", 2, 16, 0, torch.float32)
    return CacheLayout(SpardaConfig(mode="query", max_tokens=512, top_k=2), (shape,), 1, 512)


def test_what_came_back_is_given_out_again_empty(layout):
    pool, holder = CachePool(), Holder()
    first = pool.take(layout, CPU, progress=False)
    pool.lend(first, holder)
    first.state["sparda_lengths"].fill_(7)
    other = pool.take(layout, CPU, progress=False)
    assert other is not first
    del holder
    gc.collect()
    again = pool.take(layout, CPU, progress=False)
    assert again is first
    assert again.state["sparda_lengths"].tolist() == [0]


def test_one_of_other_sizes_is_let_go_of(layout):
    pool, holder = CachePool(), Holder()
    pool.lend(pool.take(layout, CPU, progress=False), holder)
    del holder
    gc.collect()
    smaller = CacheLayout(layout.config.replace(max_tokens=256), layout.layers, 1, 256)
    assert pool.take(smaller, CPU, progress=False).layout == smaller
    assert pool._idle == []


def test_only_one_is_kept(layout):
    pool, holders = CachePool(), [Holder(), Holder()]
    for holder in holders:
        pool.lend(pool.take(layout, CPU, progress=False), holder)
    holders.clear()
    del holder
    gc.collect()
    assert len(pool._idle) == 1


def test_a_cache_of_other_sizes_makes_room(layout):
    pool, holder = CachePool(), Holder()
    first = pool.take(layout, CPU, progress=False)
    pool.lend(first, holder)
    smaller = CacheLayout(layout.config.replace(max_tokens=256), layout.layers, 1, 256)
    assert not pool.lets_go_of(first, smaller)  # somebody holds it
    del holder
    gc.collect()
    assert pool.lets_go_of(first, smaller)
    assert not pool.lets_go_of(first, layout)
    assert not pool.lets_go_of(None, smaller)


@pytest.mark.parametrize("offload", ["always", "never"])
def test_texts_of_two_lengths_do_not_take_the_memory_of_both(traced_llama, monkeypatch, offload):
    """When the second cache is made, that of the text before is gone, but for one that is held."""
    fast = optimize(
        traced_llama, SpardaConfig(mode="query", top_k=1, block_size=16, local_blocks=1,
        pool_size=8, pool_stride=4, lowering="eager", offload=offload),
    )  # fmt: skip
    alive, made = [], []

    def make(layout, device):
        gc.collect()
        alive.append(sum(each() is not None for each in made))
        kv = KVCache(layout, device)
        made.append(weakref.ref(kv))
        return kv

    monkeypatch.setattr(pool_module, "KVCache", make)
    ids = torch.arange(2, 62)[None]

    def text(repeat):
        return fast.generate(
            ids.repeat(1, repeat), max_new_tokens=2, do_sample=False, return_dict_in_generate=True
        )

    for repeat in (1, 10, 20):
        text(repeat)
    held = text(1)
    text(20)
    assert alive == [0, 0, 0, 0, 1]
    assert held.past_key_values.get_seq_length() == 61
