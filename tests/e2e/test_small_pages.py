"""Pages that hold what CPU memory does: the same bits as pages of the model's dtype, in less."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig, explain, optimize
from sparda_compile.errors import ConfigError, DevicePoolFullError
from sparda_compile.registry import KV_FORMATS
from sparda_compile.state.layout import state_name
from sparda_compile.testing import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:Forecast weights are not trained:UserWarning")

FORMATS = ("int8", "fp8", "int4")
SIZE, TOKENS = 16, 90
SMALL = {
    "mode": "query", "block_size": SIZE, "pool_size": 8, "pool_stride": 4, "local_blocks": 1,
    "top_k": 2, "lowering": "eager", "prefill": "dense", "page_ratio": 1.0,
}  # fmt: skip
ALWAYS = {"offload": "never", "speculate_where": "always", "mode": "speculate"}
CHANGES = {
    "query": {},
    "on the device": {"offload": "never"},
    "sparse prompts": {"prefill": "sparse", "page_ratio": 1.5},
    "forecast, sparse prompts": {"mode": "forecast", "prefill": "sparse"},
    "chunks": {"chunk_tokens": 24},
    "sparse chunks": {"prefill": "sparse", "chunk_tokens": 40},
    "a GPU's schedule": {"mode": "exact", "hint": "previous_step", "machine": "h200"},
    "and a layer without a hint": {"mode": "exact", "hint": "next_query", "machine": "h200"},
    "dense": {"mode": "dense", "top_k": None},
    "speculate": ALWAYS,
    "union": {**ALWAYS, "repair": "union"},
}
# Turns within a block, over its end, over two ends with as much in the open block, and to an end.
SIZES = (TOKENS, 1, 3, 2, 1, 33, 30, 1, 15, *[1] * 20)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def fast(model):
    return optimize(model, SpardaConfig(**SMALL))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (2, sum(SIZES)), generator=torch.Generator().manual_seed(0))


def built(fast, **changes):
    return optimize(fast, SpardaConfig(**(SMALL | changes)))


# What reads pages by an op of its own reads each format; of the rest each change meets one, since a
# format only says how a block is packed.
READERS = ("query", "sparse prompts", "speculate")
PAIRS = [
    (kv_format, change)
    for i, change in enumerate(CHANGES)
    for kv_format in (FORMATS if change in READERS else (FORMATS[i % len(FORMATS)],))
]


@pytest.mark.parametrize(("kv_format", "change"), PAIRS)
def test_both_kinds_of_pages_give_the_same_bits(fast, ids, kv_format, change, turns):
    settings = {"kv_format": kv_format, **CHANGES[change]}
    one, other = (built(fast, page_format=name, **settings) for name in ("model", "stored"))
    want, _ = turns(one, ids, *SIZES)
    got, cache = turns(other, ids, *SIZES)
    assert torch.isfinite(got).all()
    assert torch.equal(got, want)
    assert cache.kv.state[state_name("pages", 0)].dtype == torch.uint8
    # Residency is the same, and so is what crosses the link.
    assert other.sparda.stats().layers == one.sparda.stats().layers


@pytest.mark.parametrize("kv_format", FORMATS)
def test_a_long_decode_with_few_pages(fast, ids, kv_format, turns):
    """Blocks leave and come back, and fill, many times over."""
    steps = [1] * 120
    tokens = torch.cat([ids, ids], 1)
    settings = {"kv_format": kv_format, "mode": "forecast"}
    want, _ = turns(built(fast, **settings, offload="never"), tokens, TOKENS, *steps)
    module = built(fast, **settings, page_format="stored", eviction="fifo")
    got, _ = turns(module, tokens, TOKENS, *steps)
    assert torch.equal(got, want)
    assert module.sparda.stats().total.h2d_bytes > 0


def test_more_pages_change_nothing(fast, ids, turns):
    settings = {"kv_format": "int8", "page_format": "stored"}
    runs = [
        turns(built(fast, **settings, page_ratio=ratio), ids, *SIZES)[0] for ratio in (1.0, 1.95)
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("offload", ["always", "never"])
@pytest.mark.parametrize("kv_format", FORMATS)
@torch.no_grad()
def test_a_cache_of_the_model_is_taken_over(model, fast, ids, kv_format, offload, turns):
    past = model(ids[:, :TOKENS], use_cache=True).past_key_values
    runs = []
    for page_format in ("model", "stored"):
        settings = {"kv_format": kv_format, "page_format": page_format, "offload": offload}
        module = built(fast, **settings)
        cache = module.new_cache(past=past)
        runs.append(turns(module, ids[:, TOKENS:], 1, 9, 1, past=cache)[0])
    assert torch.equal(*runs)


def test_sequences_that_go_on_from_others_take_the_open_block_along(fast, ids, turns):
    """As beams do."""
    runs = []
    for page_format in ("model", "stored"):
        module = built(fast, kv_format="int8", page_format=page_format)
        _, cache = turns(module, ids, TOKENS, 1, 1)
        cache.reorder_cache(torch.tensor([1, 1]))
        runs.append(turns(module, ids[:, TOKENS + 2 :], 1, 1, 20, 1, past=cache)[0])
    assert torch.equal(*runs)
    assert not torch.equal(runs[0][0], runs[0][1])  # their new tokens differ


def test_layers_that_keep_the_models_dtype_keep_their_pages(fast, ids, turns):
    settings = {"kv_format": {1: "int4"}, "mode": "exact", "hint": "previous_step"}
    want, _ = turns(built(fast, **settings), ids, *SIZES)
    got, cache = turns(built(fast, **settings, page_format="stored"), ids, *SIZES)
    assert torch.equal(got, want)
    assert [state_name("tail", layer) in cache.kv.state for layer in (0, 1)] == [False, True]
    assert cache.kv.state[state_name("pages", 0)].dtype == torch.float32


def test_with_the_models_format_it_makes_no_difference(fast, ids, turns):
    one, other = (built(fast, page_format=name) for name in ("model", "stored"))
    assert torch.equal(*(turns(module, ids, 30, 1, 1)[0] for module in (one, other)))
    assert "in pages too" not in str(other.sparda.stats())


@pytest.mark.parametrize("kv_format", ["values8", {1: "values4"}])
def test_keys_that_stay_have_no_such_pages(kv_format):
    with pytest.raises(ConfigError, match=r"page_format='stored' has whole.*Use page_format='mode"):
        SpardaConfig(kv_format=kv_format, page_format="stored")


@pytest.mark.parametrize("kv_format", FORMATS)
def test_a_page_takes_the_bytes_of_the_format(fast, kv_format):
    """In what `explain` says of the cache, and in what attention is expected to read."""
    settings = {
        **SMALL, "machine": "h200", "max_tokens": 4096, "top_k": 8, "kv_format": kv_format,
        "mode": "forecast",
    }  # fmt: skip
    one, other = (
        explain(fast, SpardaConfig(page_format=name, **settings)) for name in ("model", "stored")
    )
    block = 2 * SIZE * 16 * 4
    run = KV_FORMATS[kv_format].num_bytes(SIZE, 16, torch.float32)
    for mine, theirs in zip(other.layers, one.layers, strict=True):
        tails = 2 * 2 * block  # of 2 KV heads, 2 pages each
        assert mine.page_bytes - tails == theirs.page_bytes * run // block
        assert mine.host_bytes == theirs.host_bytes
        assert (mine.summary_bytes, mine.table_bytes) == (theirs.summary_bytes, theirs.table_bytes)
    assert other.device_bytes < one.device_bytes
    assert f"written in {kv_format}, in pages too" in str(other)
    assert "in pages too" not in str(one)
    for mine, theirs in zip(other.schedules, one.schedules, strict=True):
        assert [r.link_bytes for r in mine.rows] == [r.link_bytes for r in theirs.rows]
    reads = [
        next(r.hbm_bytes for r in report.schedules[0].rows if r.node == "sparse_attention_1")
        for report in (one, other)
    ]
    assert reads[1] < reads[0]


def test_more_pages_fit_where_they_are_smaller(fast, ids, turns):
    """A limit that refuses so many pages of the model's dtype has room for them as runs."""
    settings = {"kv_format": "int8", "page_ratio": 12.0, "max_tokens": 4096, "top_k": 8}
    layouts = {}
    for name in ("model", "stored"):
        _, cache = turns(built(fast, page_format=name, **settings), ids, 20)
        layouts[name] = cache.kv.layout
    limit = layouts["stored"].num_bytes(on_host=False)
    assert limit < 0.7 * layouts["model"].num_bytes(on_host=False)
    assert layouts["stored"].num_pages == layouts["model"].num_pages
    turns(built(fast, page_format="stored", device_bytes=limit, **settings), ids, 20)
    with pytest.raises(DevicePoolFullError, match="device_bytes allows"):
        turns(built(fast, page_format="model", device_bytes=limit, **settings), ids, 20)
