"""What of a cache is stored, and that tables which contradict each other are refused."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.errors import KVCacheError
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.runtime.stored import restore, stored
from sparda_compile.runtime.take_over import take_over
from sparda_compile.state.layout import CacheLayout, LayerShape


def make(offload):
    config = SpardaConfig(mode="query", block_size=16, local_blocks=1, top_k=1, offload=offload)
    layers = (
        LayerShape(0, "sparse", 2, 8, 0, torch.float32),
        LayerShape(1, "window", 2, 8, 20, torch.float32),
    )
    return KVCache(CacheLayout(config, layers, 2, 256), torch.device("cpu"))


def fill(kv):
    """Give one sequence 70 tokens and the other 20."""
    parts = torch.randn(2, 2, 2, 70, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(70) >= torch.tensor([[0], [50]])
    take_over(kv, {layer: tuple(parts) for layer in range(2)}, mask)
    return kv


@pytest.mark.parametrize("offload", ["always", "never"])
def test_all_comes_back_but_places_that_hold_nothing(offload):
    kv, other = fill(make(offload)), make(offload)
    tensors = stored(kv)
    assert tensors["sparda_pages_0"].shape[2] == (3 if offload == "always" else 5)
    assert tensors["sparda_host_0"].shape[2:3] == ((4,) if offload == "always" else ())
    restore(other, tensors)
    assert kv.state.keys() == other.state.keys() == tensors.keys()
    assert all(torch.equal(other.state[name], tensor) for name, tensor in kv.state.items())


def test_blocks_that_a_sequence_has_not_filled_are_zero():
    kv = fill(make("always"))
    kv.host_blocks["sparda_host_0"][1, :, 1:] = 7.0  # of an earlier text
    host = stored(kv)["sparda_host_0"]
    assert (host[0] != 0).any(-1).all()
    assert (host[1, :, 1:] == 0).all()
    assert (host[1, :, :1] != 0).any()
    assert (kv.host_blocks["sparda_host_0"][1, :, 1:] == 7.0).all()


def test_an_empty_cache_stores_no_page():
    tensors = stored(make("always"))
    assert (tensors["sparda_pages_0"].numel(), tensors["sparda_host_0"].numel()) == (0, 0)
    restore(make("always"), tensors)


@pytest.mark.parametrize("table", ["block_table", "page_block"])
@pytest.mark.parametrize("value", [-1, 0, 2, 99])
def test_one_wrong_entry_of_a_table_is_refused(table, value):
    """Whatever it is: the entry says which block is on the page of block 3, or where that is."""
    tensors = stored(fill(make("always")))
    page = int(tensors["sparda_block_table_0"][0, 0, 3])
    place = 3 if table == "block_table" else page
    assert tensors[f"sparda_{table}_0"][0, 0, place] not in (-1, value)
    tensors[f"sparda_{table}_0"][0, 0, place] = value
    kv = make("always")
    with pytest.raises(KVCacheError, match="contradict each other"):
        restore(kv, tensors)
    assert (kv.state["sparda_lengths"] == 0).all()
