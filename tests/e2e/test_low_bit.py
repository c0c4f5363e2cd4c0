"""Selectors by keys in few bits where a cache changes its form: growth, turns, moves to the CPU.

A block that is being written has no codes yet: its keys wait in `open_k`, and are quantised when it
fills, whoever fills it: a prompt, a later turn, or a step.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.state.layout import state_name

SMALL = {
    "block_size": 16, "pool_size": 8, "pool_stride": 4, "local_blocks": 1, "top_k": 2,
    "lowering": "eager", "machine": "h200", "prefill": "dense",
    "attend_before_repair": "always",
}  # fmt: skip
PADDING = 37
CASES = {
    "lowbit2": {"mode": "query", "selector": "lowbit2"},
    "lowbit4": {"mode": "query", "selector": "lowbit4"},
    "lowbit2 by forecast": {"mode": "forecast", "selector": "lowbit2"},
    "lowbit4 with hints": {"mode": "exact", "hint": ("ema", "forecast"), "selector": "lowbit4"},
}


@pytest.fixture(scope="module")
def make(traced_llama):
    def made(name, **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a Forecast that nobody has trained
            return optimize(traced_llama, SpardaConfig(**{**SMALL, **CASES[name], **settings}))

    return made


def text(length):
    """Return ids of two sequences, one of them padded, and their mask."""
    ids = torch.randint(2, 250, (2, length), generator=torch.Generator().manual_seed(length))
    return ids, (torch.arange(length) >= torch.tensor([[0], [PADDING]])).long()


def run(fast, cache, ids, mask, ends):
    """Pass ids in parts that end there; return the last logits of each."""
    found, begin = [], 0
    for end in ends:
        out = fast(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        found.append(out.logits[:, -1])
        begin = end
    return torch.stack(found)


def kept(cache, layer, count):
    """Return codes, spans and bases of the first blocks, and the keys of the open ones."""
    layout = cache.kv.layout
    (summary,) = layout.summaries(layer)
    names = layout.summary_tensors(summary, layout.layers[layer])
    tensors = [cache.kv.state[state_name(name, layer)] for name in names]
    return [tensor[:, :, :count] for tensor in tensors[:3]] + tensors[3:]


@pytest.mark.parametrize("offload", ["always", "never"])
@pytest.mark.parametrize("name", CASES)
def test_a_cache_that_grows_goes_on_as_one_that_had_the_room(make, name, offload):
    ids, mask = text(530)
    fast = make(name, offload=offload)
    ends = [505, *range(506, 531)]  # 512 tokens are full in a step, in the middle of a block
    found, caches = [], []
    for room in (100, 1024):
        caches.append(fast.new_cache(room))
        found.append(run(fast, caches[-1], ids, mask, ends))
    assert [cache.kv.layout.max_tokens for cache in caches] == [1024, 1024]
    assert torch.equal(*found)
    for layer in range(2):
        pairs = zip(*(kept(cache, layer, 64) for cache in caches), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", CASES)
def test_a_cache_that_grows_out_of_the_device_keeps_its_codes(make, name):
    """Small it fits `device_bytes`, and large it does not: its blocks move to the CPU."""
    ids, mask = text(530)
    ends = [505, *range(506, 531)]
    found = []
    for device_bytes in (900_000, None):
        fast = make(name, offload="auto", device_bytes=device_bytes)
        cache = fast.new_cache(100)
        before = run(fast, cache, ids, mask, ends[:4])
        assert not cache.kv.layout.offload
        after = [
            fast(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache).logits
            for end in ends[4:]
        ]
        assert cache.kv.layout.offload == (device_bytes is not None)
        found.append((before, torch.stack(after)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("ends", [(90, 91, 95, 130), (64, 128, 129, 130), (16, 40, 130)])
@pytest.mark.parametrize("name", ["lowbit2", "lowbit4"])
def test_turns_of_any_length_leave_the_codes_of_one(make, name, ends):
    """Blocks that two turns fill together, of sequences that are not at the same place in them."""
    ids, mask = text(131)
    fast = make(name, top_k=None)  # so that rounding alone differs
    caches, last = [], []
    for parts in (ends, (130,)):
        caches.append(fast.new_cache(200))
        last.append(run(fast, caches[-1], ids, mask, (*parts, 131))[-1])
    torch.testing.assert_close(*last, rtol=1e-4, atol=1e-4)
    lengths = caches[0].kv.lengths()
    assert lengths == caches[1].kv.lengths() == [131, 131 - PADDING]
    for layer in range(2):
        one, other = (kept(cache, layer, 512 // 16) for cache in caches)
        for row, length in enumerate(lengths):
            full, rest = length // 16, length % 16
            assert (one[0][row, :, :full] != 0).any(-1).any(-1).all()
            assert torch.equal(one[0][row, :, :full], other[0][row, :, :full])
            for mine, theirs in zip(one[1:3], other[1:3], strict=True):
                torch.testing.assert_close(mine[row, :, :full], theirs[row, :, :full])
            torch.testing.assert_close(one[3][row, :, :rest], other[3][row, :, :rest])


@pytest.mark.parametrize("name", ["lowbit2", "lowbit2 by forecast"])
def test_beams_are_those_of_the_original_at_full_budget(make, shared_llama, name):
    ids, mask = text(60)
    settings = {
        "num_beams": 3, "max_new_tokens": 24, "do_sample": False, "attention_mask": mask,
    }  # fmt: skip
    got = make(name, top_k=None).generate(ids, **settings)
    assert torch.equal(got, shared_llama.generate(ids, **settings))
