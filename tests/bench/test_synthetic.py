from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from sparda_compile.bench.memory import layout_of
from sparda_compile.bench.shapes import SHAPES
from sparda_compile.bench.synthetic import draw_steps, fill, follow, rewind
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.state.layout import LENGTHS, LayerShape, state_name

CPU = torch.device("cpu")
TOKENS = 1500
SETTINGS = {"top_k": 4, "local_blocks": 2}


def cache(variant, batch=2, steps=6, **settings):
    settings = SETTINGS | settings
    return KVCache(layout_of(SHAPES["tiny"], variant, batch, 2048, steps, **settings), CPU)


def blocks(kv, layer):
    """Return the blocks of a layer, wherever they live."""
    host = kv.host_blocks[state_name("host", layer)]
    return host if host.numel() else kv.state[state_name("pages", layer)]


def test_same_content_wherever_blocks_live():
    offloaded, resident = cache("scheduled"), cache("resident")
    for kv in (offloaded, resident):
        fill(kv, TOKENS)
    for layer in (0, 1):
        one, other = blocks(offloaded, layer), blocks(resident, layer)
        assert torch.equal(one[:, :, :24], other[:, :, :24])
        assert one[:, :, :24].float().std() > 0.9
        assert not one[:, :, 24:].any()
    assert not torch.equal(blocks(offloaded, 0), blocks(offloaded, 1))
    assert offloaded.lengths() == [TOKENS, TOKENS]


def test_content_is_rounded_wherever_blocks_live():
    caches = [cache(variant, kv_format="int8") for variant in ("scheduled", "resident")]
    for kv in caches:
        fill(kv, TOKENS)
    offloaded, resident = (blocks(kv, 0) for kv in caches)
    pages = resident[:, :, :24]
    found, sizes = caches[0].layout.kv_format(0), pages.shape[-2:]
    assert torch.equal(found.unpack(offloaded[:, :, :24], *sizes, pages.dtype), pages)
    table = caches[0].state[state_name("block_table", 0)]
    tail = caches[0].state[state_name("pages", 0)][0, 0, table[0, 0, TOKENS // 64]]
    assert torch.equal(tail, pages[0, 0, TOKENS // 64])


@pytest.mark.parametrize("variant", ["scheduled", "resident"])
def test_content_of_pages_of_runs_is_that_of_others(variant):
    small, plain = (
        cache(variant, kv_format="int8", page_format=name) for name in ("stored", "model")
    )
    for kv in (small, plain):
        fill(kv, TOKENS)
    current, found = TOKENS // 64, small.layout.kv_format(1)
    table = plain.state[state_name("block_table", 1)]
    assert torch.equal(small.state[state_name("block_table", 1)], table)
    pages = plain.state[state_name("pages", 1)]
    page = table[0, 1, current]
    assert torch.equal(small.state[state_name("tail", 1)][0, 1, 0], pages[0, 1, page])
    mine, theirs = blocks(small, 1)[:, :, :current], blocks(plain, 1)[:, :, :current]
    if variant == "resident":
        theirs = found.pack(theirs)
    assert torch.equal(mine, theirs)
    small.state[state_name("tail", 1)].zero_()
    rewind(small, TOKENS - 64)
    tail = small.state[state_name("tail", 1)][0, 1, 0]
    assert torch.equal(found.pack(tail), blocks(small, 1)[0, 1, current - 1])


def test_tail_is_resident_and_equal_to_its_block():
    kv = cache("scheduled")
    fill(kv, TOKENS)
    current = TOKENS // 64
    table = kv.state[state_name("block_table", 1)]
    assert ((table >= 0).sum(-1) == 1).all()
    for row in range(2):
        for group in range(2):
            page = kv.state[state_name("pages", 1)][row, group, table[row, group, current]]
            assert torch.equal(page, blocks(kv, 1)[row, group, current])


def test_rewind_takes_lengths_and_tables_back():
    kv = cache("scheduled")
    fill(kv, TOKENS)
    before = {name: tensor.clone() for name, tensor in kv.state.items()}
    kv.state[LENGTHS].add_(5)
    kv.state[state_name("block_table", 0)].fill_(3)
    kv.state[state_name("page_block", 0)].fill_(3)
    rewind(kv, TOKENS)
    assert all(torch.equal(kv.state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("overlap", "kept"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_trace_has_the_stated_overlap(overlap, kept):
    kv = cache("scheduled")
    fill(kv, TOKENS)
    follow(kv, TOKENS, overlap)
    trace = kv.state[state_name("trace", 1)]
    steps = [trace[:, :, (TOKENS + step) % 6] for step in range(6)]
    for step in steps:
        assert (step.sum(-1) == 4).all()
        assert not step[..., :1].any()  # sink
        assert not step[..., TOKENS // 64 - 2 :].any()  # local and current
    for one, other in pairwise(steps):
        assert ((one & other).sum(-1) == kept).all()


def test_trace_that_cannot_be():
    with pytest.raises(ValueError, match="cannot be"):
        follow(cache("scheduled", steps=0), TOKENS, 0.5)
    with pytest.raises(ValueError, match="cannot be"):
        follow(cache("scheduled"), 300, 0.5)


def test_sliding_windows_are_refused():
    kv = cache("scheduled")
    ring = LayerShape(0, "window", 2, 16, 64, torch.bfloat16)
    object.__setattr__(kv.layout, "layers", (ring,))
    with pytest.raises(ValueError, match="sliding window"):
        fill(kv, TOKENS)


@pytest.mark.parametrize("kept", [0, 3, 5])
def test_steps_share_as_many_blocks_as_are_kept(kept):
    random = torch.Generator().manual_seed(0)
    steps = list(draw_steps((2, 3, 12), 5, kept, 4, random))
    assert len(steps) == 4
    for step in steps:
        assert step.shape == (2, 3, 12)
        assert (step.sum(-1) == 5).all()
    for one, other in pairwise(steps):
        assert ((one & other).sum(-1) == kept).all()
    assert kept == 5 or not torch.equal(steps[0][0], steps[0][1])
