"""What rounding full blocks means: which call reads what, in every mode and however it is cut."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from sparda_compile import SpardaConfig, explain, optimize
from sparda_compile.errors import ConfigError, UnsupportedInputError
from sparda_compile.registry import KV_FORMATS
from sparda_compile.state.layout import state_name
from sparda_compile.testing import build, tiny_llama

FORMATS = ("int8", "fp8", "int4", "values8", "values4")
SIZE, TOKENS = 16, 90
SMALL = {
    "mode": "query", "block_size": SIZE, "pool_size": 8, "pool_stride": 4, "local_blocks": 1,
    "top_k": 2, "lowering": "eager", "prefill": "dense",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def fast(model):
    return optimize(model, SpardaConfig(**SMALL))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (2, TOKENS + 30), generator=torch.Generator().manual_seed(0))


def built(fast, **changes):
    return optimize(fast, SpardaConfig(**(SMALL | changes)))


def rounded_past(model, ids, kv_format):
    """Return the model's own cache of tokens, full blocks as a format reads them back."""
    found, past = KV_FORMATS[kv_format], DynamicCache()
    model(ids, past_key_values=past)
    full = ids.shape[1] // SIZE * SIZE
    for layer in past.layers:
        parts = [part[:, :, :full].unflatten(2, (-1, SIZE)) for part in (layer.keys, layer.values)]
        blocks = torch.stack(parts, 3)
        for part, new in zip(
            (layer.keys, layer.values), found.rounded(blocks).unbind(3), strict=True
        ):
            part[:, :, :full] = new.flatten(2, 3)
    return past


@pytest.mark.parametrize("kv_format", FORMATS)
@torch.no_grad()
def test_a_call_reads_its_own_tokens_and_the_open_block_as_they_are(
    model, fast, ids, kv_format, turns
):
    """And of the past the full blocks rounded: the model itself says so, with such a cache."""
    module = built(fast, mode="dense", kv_format=kv_format, top_k=None)
    got, _ = turns(module, ids, TOKENS, 17, 1)
    want = model(ids[:, :TOKENS]).logits
    torch.testing.assert_close(got[:, :TOKENS], want, rtol=1e-4, atol=1e-4)
    past = rounded_past(model, ids[:, :TOKENS], kv_format)
    want = model(ids[:, TOKENS : TOKENS + 17], past_key_values=past).logits
    torch.testing.assert_close(got[:, TOKENS:-1], want, rtol=1e-4, atol=1e-4)
    exact = model(ids[:, : TOKENS + 17]).logits[:, TOKENS:]
    assert float((want - exact).abs().max()) > 1e-3


@pytest.mark.parametrize("changes", [{}, {"prefill": "sparse"}, {"mode": "dense", "top_k": None}])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_chunks_are_turns(fast, ids, kv_format, changes, turns):
    chunked = built(fast, kv_format=kv_format, chunk_tokens=40, **changes)
    whole = built(fast, kv_format=kv_format, **changes)
    got, _ = turns(chunked, ids, TOKENS, 1, 1)
    want, _ = turns(whole, ids, 40, 40, 10, 1, 1)
    assert torch.equal(got, want)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_sparse_prompts_read_the_same_wherever_blocks_are(fast, ids, kv_format, turns):
    one, other = (
        built(fast, kv_format=kv_format, prefill="sparse", offload=offload, page_ratio=1.0)
        for offload in ("always", "never")
    )
    sizes = (50, 45, 1, 1, 20)
    assert torch.equal(turns(one, ids, *sizes)[0], turns(other, ids, *sizes)[0])


@pytest.mark.parametrize("kv_format", FORMATS)
def test_speculation_equals_query(fast, ids, kv_format, turns):
    sizes = (TOKENS, *[1] * 20)
    want, _ = turns(built(fast, kv_format=kv_format, offload="never"), ids, *sizes)
    module = built(
        fast, mode="speculate", kv_format=kv_format, offload="never", speculate_where="always"
    )
    got, _ = turns(module, ids, *sizes)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offload", ["always", "never"])
@pytest.mark.parametrize("kv_format", FORMATS)
@torch.no_grad()
def test_a_cache_of_the_model_is_taken_over_and_rounded(
    model, fast, ids, kv_format, offload, turns
):
    module = built(fast, kv_format=kv_format, offload=offload, max_tokens=512)
    past = model(ids[:, :TOKENS], use_cache=True).past_key_values
    taken = module.new_cache(past=past)
    _, read = turns(module, ids, TOKENS)
    found = KV_FORMATS[kv_format]
    for layer in (0, 1):
        pages = [c.kv.state[state_name("pages", layer)] for c in (taken, read)]
        tables = [c.kv.state[state_name("block_table", layer)] for c in (taken, read)]
        assert torch.equal(*tables)
        resident = pages[0].abs().sum((-1, -2, -3)) > 0
        # Not every number is the prompt's to the last bit, and a code may be the next one.
        for one, other in zip(*(each[resident] for each in pages), strict=True):
            step = float(found.bound(one).max()) * 2.2
            torch.testing.assert_close(one, other, rtol=0, atol=step)
    step = ids[:, TOKENS : TOKENS + 1]
    logits = [module(step, past_key_values=cache).logits for cache in (taken, read)]
    torch.testing.assert_close(*logits, rtol=0, atol=0.1)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_bytes_are_those_of_the_format(fast, ids, kv_format, turns):
    num_bytes = KV_FORMATS[kv_format].num_bytes(SIZE, 16, torch.float32)
    module = built(fast, kv_format=kv_format, page_ratio=1.0)
    _, cache = turns(module, ids, TOKENS, *[1] * 20)
    total, layout = module.sparda.stats().total, cache.kv.layout
    pairs = 2 * 2 * 2  # layers, sequences and heads
    assert total.d2h_bytes == pairs * ((TOKENS + 20) // SIZE) * num_bytes
    assert total.h2d_bytes == total.misses * num_bytes > 0
    assert layout.num_bytes(on_host=True) == pairs * layout.num_blocks * num_bytes
    assert layout.num_bytes(on_host=True) == sum(b.nbytes for b in cache.kv.host_blocks.values())
    resident = built(fast, kv_format=kv_format, offload="never")
    turns(resident, ids, TOKENS, *[1] * 20)
    assert resident.sparda.stats().total.d2h_bytes == 0


def test_a_plan_moves_fewer_bytes(fast):
    """In the schedule, and in what `explain` says that the cache takes."""
    settings = {**SMALL, "machine": "h200", "max_tokens": 4096, "top_k": 8, "mode": "forecast"}
    reports = {
        name: explain(fast, SpardaConfig(kv_format=name, **settings))
        for name in ("model", *FORMATS)
    }
    full = 2 * SIZE * 16 * 4
    for name in FORMATS:
        share = KV_FORMATS[name].num_bytes(SIZE, 16, torch.float32) / full
        one, other = reports[name], reports["model"]
        assert one.host_bytes == pytest.approx(other.host_bytes * share)
        # Keys that stay are kept in a few bits by this selector for that alone.
        stays = KV_FORMATS[name].summary is not None
        assert (one.device_bytes > other.device_bytes) == stays
        assert stays or one.device_bytes == other.device_bytes
        assert f"Full blocks: written in {name}" in str(one)
        for mine, theirs in zip(one.schedules, other.schedules, strict=True):
            moved = {row.node: row.link_bytes for row in mine.rows if row.link_bytes}
            want = {row.node: row.link_bytes * share for row in theirs.rows if row.link_bytes}
            assert moved == pytest.approx(want, abs=2)
            assert moved


@pytest.mark.parametrize("kv_format", ["model", *FORMATS])
@torch.no_grad()
def test_nan_reaches_what_follows_wherever_blocks_are(ids, kv_format, turns):
    """Scores are NaN then, and the block of the new token is read all the same."""
    model = tiny_llama()
    model.model.embed_tokens.weight[128] = float("nan")
    ids = ids.where(ids != 128, 0)
    ids[1, TOKENS + 2] = 128
    fast, sizes = optimize(model, SpardaConfig(**SMALL)), (TOKENS, *[1] * 20)
    want = None
    for changes in (
        {},
        {"offload": "never"},
        {"page_ratio": 1.0},
        {"mode": "exact", "hint": "ema"},
    ):
        got, _ = turns(built(fast, kv_format=kv_format, **changes), ids, *sizes)
        assert got[0].isfinite().all()
        # As long as the token is in a block that is always read.
        assert got[1, TOKENS + 2 : TOKENS + SIZE].isnan().all()
        want = got if want is None else want
        assert torch.equal(got.nan_to_num(1e9), want.nan_to_num(1e9))


def test_models_of_other_dtypes_are_refused():
    with pytest.raises(UnsupportedInputError, match=r"kv_format='int8'.*float64"):
        optimize(tiny_llama().double(), SpardaConfig(**SMALL, kv_format="int8"))


def test_layers_may_have_formats_of_their_own(fast, ids, turns):
    """One int4, the other as the model's: as far from all of the model's as from all int4."""
    sizes, settings = (TOKENS, *[1] * 20), {"mode": "exact", "hint": "previous_step"}
    runs = {}
    for name, kv_format in (("mixed", {1: "int4"}), ("model", "model"), ("int4", "int4")):
        module = built(fast, kv_format=kv_format, page_ratio=1.0, **settings)
        runs[name], cache = turns(module, ids, *sizes)
        if name == "mixed":
            for changes in ({"mode": "query"}, {"mode": "query", "offload": "never"}):
                other, _ = turns(built(fast, kv_format=kv_format, **changes), ids, *sizes)
                assert torch.equal(other, runs[name])
            first, second = module.sparda.stats().layers.values()
            num_bytes = [2 * SIZE * 16 * 4, KV_FORMATS["int4"].num_bytes(SIZE, 16, torch.float32)]
            assert first.d2h_bytes * num_bytes[1] == second.d2h_bytes * num_bytes[0] > 0
            held = [b.nbytes for b in cache.kv.host_blocks.values()]
            assert held[0] * num_bytes[1] == held[1] * num_bytes[0]
    assert torch.equal(runs["mixed"][:, :TOKENS], runs["model"][:, :TOKENS])
    assert not torch.equal(runs["mixed"], runs["model"])
    assert not torch.equal(runs["mixed"], runs["int4"])
    report = explain(fast, SpardaConfig(**{**SMALL, "kv_format": {1: "int4"}}))
    assert report.kv_format == "model in layer 0; int4 in layer 1"


@pytest.mark.parametrize("selector", ["infllm2", "lowbit2", "lowbit4"])
def test_keys_stay_in_the_layers_that_say_so(fast, ids, selector, turns):
    """Each layer has the summaries that it scores with, and those it reads keys from."""
    sizes = (TOKENS, *[1] * 20)
    settings = {"kv_format": {1: "values8"}, "selector": selector, "page_ratio": 1.0}
    want, cache = turns(built(fast, **settings, offload="never"), ids, *sizes)
    kept = [state_name("key_codes", layer) in cache.kv.state for layer in (0, 1)]
    assert kept == [selector == "lowbit4", True]
    for changes in ({}, {"mode": "exact", "hint": "previous_step", "machine": "h200"}):
        module = built(fast, **settings, **changes)
        assert torch.equal(turns(module, ids, *sizes)[0], want)
        first, second = module.sparda.stats().layers.values()
        num_bytes = [2 * SIZE * 16 * 4, KV_FORMATS["values8"].num_bytes(SIZE, 16, torch.float32)]
        assert first.d2h_bytes * num_bytes[1] == second.d2h_bytes * num_bytes[0] > 0
        assert module.sparda.stats().formats == {0: "model", 1: "values8"}
    one, other = (
        explain(fast, SpardaConfig(**{**SMALL, **settings, "kv_format": name, "max_tokens": 512}))
        for name in ("model", {1: "values8"})
    )
    codes = one.layers[0].host_bytes // (2 * 8)  # 4 bits for each of half of the 32-bit elements
    more = [
        b.summary_bytes - a.summary_bytes for a, b in zip(one.layers, other.layers, strict=True)
    ]
    assert more[0] == 0
    assert more[1] == 0 if selector == "lowbit4" else more[1] > codes


@pytest.mark.parametrize("kv_format", ["values8", "values4"])
def test_keys_stay_beside_layers_that_have_a_window(ids, kv_format, turns):
    traced = optimize(build("gemma3"), SpardaConfig(**SMALL))
    sizes = (TOKENS, *[1] * 20)
    want, cache = turns(built(traced, kv_format=kv_format, offload="never"), ids, *sizes)
    assert [state_name("ring_k", layer) in cache.kv.state for layer in (0, 1)] == [True, False]
    module = built(traced, kv_format=kv_format, offload="always")
    assert torch.equal(turns(module, ids, *sizes)[0], want)
    assert module.sparda.stats().layers[1].h2d_bytes > 0


def test_a_format_of_a_layer_without_blocks_is_refused(fast):
    with pytest.raises(ConfigError, match=r"kv_format names 'int8' for layer 7.*are 0, 1;"):
        built(fast, kv_format={7: "int8"})
