"""Memory of a cache that is gone serves the next one of its sizes."""

from __future__ import annotations

import gc

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.module.pool import CachePool
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
