from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.state.layout import COUNTERS, CacheLayout, LayerShape, TensorSpec, state_name

SPARSE = LayerShape(0, "sparse", 2, 64, 0, torch.bfloat16)
WINDOW = LayerShape(1, "window", 2, 64, 100, torch.bfloat16)


def layout(max_tokens=64 * 200, batch_size=3, layers=(SPARSE,), **config):
    return CacheLayout(SpardaConfig(**config), layers, batch_size, max_tokens)


def test_published_sizes():
    sizes = layout()
    assert (sizes.num_blocks, sizes.num_selected, sizes.num_pages) == (200, 96, 144)
    tensors = sizes.tensors(SPARSE)
    assert tensors["pages"].shape == (3, 2, 144, 2, 64, 64)
    assert tensors["host"] == TensorSpec((3, 2, 200, 2, 64, 64), torch.bfloat16, on_host=True)
    assert tensors["block_table"].shape == (3, 2, 200)
    assert tensors["page_block"].shape == tensors["page_stamp"].shape == (3, 2, 144)
    assert tensors["pooled_k"].shape == (3, 2, 799, 64)
    assert tensors["recent_k"].shape == (3, 2, 32, 64)
    assert [t.fill for n, t in tensors.items() if n.startswith(("block", "page_"))] == [-1] * 3
    assert [name for name, t in tensors.items() if t.on_host] == ["host"]
    assert "last_block_ids" not in tensors


def test_pages_of_runs_are_as_large_as_what_is_in_cpu_memory():
    """Two layers, one of which keeps the model's dtype; the tail has a block and what it was."""
    other = LayerShape(2, "sparse", 2, 64, 0, torch.bfloat16)
    settings = {"kv_format": {0: "int8"}, "layers": (SPARSE, other, WINDOW)}
    plain, sizes = layout(**settings), layout(**settings, page_format="stored")
    run = 2 * 64 * 64 + 2 * (64 + 64)
    tensors = sizes.tensors(SPARSE)
    assert tensors["pages"] == TensorSpec((3, 2, 144, run), torch.uint8)
    assert tensors["tail"] == TensorSpec((3, 2, 2, 2, 64, 64), torch.bfloat16)
    assert tensors["host"].shape == (3, 2, 200, run)
    assert list(tensors)[:2] == ["pages", "tail"]
    for shape in (other, WINDOW):
        assert sizes.tensors(shape) == plain.tensors(shape)
    assert [sizes.has_stored_pages(n) for n in (0, 2)] == [True, False]
    assert [sizes.page_bytes(shape) for shape in (SPARSE, other)] == [run, 2 * 64 * 64 * 2]
    assert [plain.page_bytes(shape) for shape in (SPARSE, other)] == [2 * 64 * 64 * 2] * 2
    assert sizes.block_bytes(SPARSE) == plain.page_bytes(SPARSE)
    assert sizes.num_pages == plain.num_pages


@pytest.mark.parametrize(
    ("num_blocks", "ratio", "num_pages"),
    [(200, 1.0, 97), (200, 1.01, 97), (200, 1.5, 144), (200, 3.0, 200), (96, 1.0, 96), (4, 9, 4)],
)
def test_pages_are_more_than_selected_blocks_unless_all_fit(num_blocks, ratio, num_pages):
    assert layout(64 * num_blocks, page_ratio=ratio).num_pages == num_pages


@pytest.mark.parametrize("config", [{"offload": "never"}, {"mode": "dense"}, {"offload": "auto"}])
def test_without_offload_every_block_has_a_page(config):
    sizes = layout(**config)
    assert not sizes.offload
    assert sizes.num_pages == sizes.num_blocks
    assert sizes.tensors(SPARSE)["host"].shape == (0,)
    assert sizes.num_bytes(on_host=True) == 0


@pytest.mark.parametrize(
    ("config", "is_ahead"),
    [
        ({"mode": "forecast"}, True),
        ({"mode": "query"}, False),
        ({"mode": "exact"}, False),
        ({"mode": "forecast", "offload": "never"}, False),
        ({"mode": "forecast", "local_blocks": 0}, False),
        ({"mode": "forecast", "local_blocks": 1}, True),
        ({"mode": "forecast", "selector": "lowbit2", "local_blocks": 0}, False),
        ({"mode": "forecast", "selector": "lowbit2", "prefill_selector": "infllm2"}, True),
        ({"mode": "forecast", "selector": "nosa"}, False),  # a short list is a choice among all
        ({"mode": "forecast", "block_size": 16, "pool_size": 64, "local_blocks": 2}, False),
        ({"mode": "forecast", "block_size": 16, "pool_size": 64, "local_blocks": 3}, True),
    ],
)
def test_the_past_is_staged_ahead_where_new_keys_change_no_score_of_it(config, is_ahead):
    assert layout(**config).stages_ahead == is_ahead


def test_a_cache_keeps_the_summary_of_who_selects_for_prompts_while_one_may_be_sparse():
    settings = {"selector": "lowbit2", "prefill_selector": "infllm2"}
    for mode in ("query", "forecast", "exact"):
        assert layout(mode=mode, **settings).scored_summaries() == ("lowbit2_keys", "pooled_keys")
    for fixed in ({"prefill": "dense"}, {"top_k": None}):
        assert layout(mode="query", **settings, **fixed).scored_summaries() == ("lowbit2_keys",)


def test_auto_offloads_what_does_not_fit():
    resident = layout(offload="never").num_bytes(on_host=False)
    assert not layout(offload="auto", device_bytes=resident).offload
    assert layout(offload="auto", device_bytes=resident - 1).offload


@pytest.mark.parametrize(
    ("config", "summaries"),
    [
        ({"mode": "dense"}, ()),
        ({"mode": "query", "selector": "quest"}, ("key_bounds",)),
        ({"mode": "query", "selector": "infllm2"}, ("pooled_keys",)),
        ({"mode": "forecast", "selector": "quest"}, ("pooled_keys",)),
        ({"mode": "exact", "selector": "quest"}, ("key_bounds", "pooled_keys")),
        ({"mode": "exact", "selector": "quest", "hint": "previous_step"}, ("key_bounds",)),
        ({"mode": "exact", "selector": "infllm2"}, ("pooled_keys",)),
        ({"mode": "query", "selector": "nosa"}, ("pooled_keys",)),
        ({"mode": "forecast", "selector": "nosa"}, ("pooled_keys",)),
        ({"mode": "query", "selector": "lowbit4"}, ("lowbit4_keys",)),
        ({"mode": "forecast", "selector": "lowbit2"}, ("lowbit2_keys",)),
        ({"mode": "exact", "selector": "lowbit2"}, ("lowbit2_keys",)),
        ({"mode": "query", "kv_format": "values8"}, ("lowbit4_keys", "pooled_keys")),
        ({"mode": "query", "selector": "lowbit4", "kv_format": "values4"}, ("lowbit4_keys",)),
        (
            {"mode": "query", "selector": "lowbit2", "kv_format": "values4"},
            ("lowbit2_keys", "lowbit4_keys"),
        ),
    ],
)
def test_summaries_are_those_that_are_scored(config, summaries):
    sizes = layout(**config)
    assert sizes.summaries(SPARSE.layer) == summaries
    for summary in ("key_bounds", "pooled_keys", *summaries):
        for name in sizes.summary_tensors(summary, SPARSE):
            assert (name in sizes.tensors(SPARSE)) == (summary in summaries)


def test_each_summary_has_tensors_of_its_own():
    sizes = layout(mode="query", selector="lowbit2", kv_format="values8")
    tensors = sizes.tensors(SPARSE)
    for bits, num_bytes in ((2, 16), (4, 32)):
        codes, *_ = sizes.summary_tensors(f"lowbit{bits}_keys", SPARSE)
        assert tensors[codes] == TensorSpec((3, 2, 200, num_bytes, 64), torch.uint8)
    assert sizes.staying_keys(SPARSE.layer) == sizes.summary_tensors("lowbit4_keys", SPARSE)[:3]


def test_keys_of_a_window_do_not_stay():
    sizes = layout(layers=(SPARSE, WINDOW), kv_format="values8")
    assert [len(sizes.staying_keys(shape.layer)) for shape in sizes.layers] == [3, 0]
    assert set(sizes.tensors(WINDOW)) == {"ring_k", "ring_v"}


@pytest.mark.parametrize(
    ("num_blocks", "share"), [(200, 0.3 * 56 / 104), (144, 0.0), (97, 0.0), (96, 0.0), (4, 0.0)]
)
def test_blocks_that_all_have_a_page_are_not_fetched(num_blocks, share):
    """Of 200 blocks 96 are selected, and 144 have a page."""
    sizes = layout(64 * num_blocks)
    assert sizes.fresh_share(0.7) == pytest.approx(share)
    assert sizes.overlap_at(share) == pytest.approx(0.7 if share else 1.0)
    assert (sizes.overlap_at(0.0), sizes.overlap_at(1.5)) == (1.0, 0.0 if share else 1.0)


def test_previous_step_remembers_its_ids():
    spec = layout(mode="exact", hint="previous_step").tensors(SPARSE)["last_block_ids"]
    assert spec == TensorSpec((3, 2, 96), torch.int32, fill=-1)


def test_ema_has_a_level_and_a_trend_for_each_block():
    sizes = layout(mode="exact", hint=("previous_step", "ema"))
    tensors = sizes.tensors(SPARSE)
    shape = (3, 2, sizes.num_blocks)
    assert tensors["level"] == TensorSpec(shape, torch.float32, fill=float("-inf"))
    assert tensors["trend"] == TensorSpec(shape, torch.float32)
    assert "last_block_ids" in tensors


def test_speculation_has_its_prediction_and_a_budget_for_all_sequences():
    sizes = layout(mode="speculate", offload="never", speculation_budget=0.5)
    tensors = sizes.tensors(SPARSE)
    assert {"level", "trend"} <= set(tensors)
    assert tensors["predicted"] == TensorSpec((3, 2, 34 + 31), torch.int32, fill=-1)
    assert tensors["budget"] == TensorSpec((1,), torch.int32, fill=65, is_shared=True)
    assert not sizes.offload


def test_speculation_refuses_what_does_not_fit_the_device():
    fits = layout(mode="speculate", offload="auto", device_bytes=1 << 40)
    assert not fits.offload
    small = layout(mode="speculate", offload="auto", device_bytes=1 << 20)
    with pytest.raises(ConfigError, match=r"device_bytes=1,048,576 .* or use mode='exact' with"):
        assert small.offload
    with pytest.raises(ConfigError, match="raise device_bytes, pass offload='never'"):
        small.all_tensors()


def test_window_layers_have_a_ring_only():
    tensors = layout(layers=(SPARSE, WINDOW)).tensors(WINDOW)
    ring = TensorSpec((3, 2, 100, 64), torch.bfloat16)
    assert tensors == {"ring_k": ring, "ring_v": ring}


def test_all_tensors_are_named_by_layer_and_add_up():
    sizes = layout(layers=(SPARSE, WINDOW))
    tensors = sizes.all_tensors()
    assert tensors["sparda_lengths"] == TensorSpec((3,), torch.int32)
    assert {state_name("pages", 0), state_name("ring_k", 1)} <= set(tensors)
    assert len(tensors) == 1 + len(sizes.tensors(SPARSE)) + 2
    assert tensors[state_name("counters", 0)].shape == (len(COUNTERS),)
    host = 3 * 2 * 200 * 2 * 64 * 64 * 2
    assert sizes.num_bytes(on_host=True) == host
    total = sum(torch.empty(t.shape, dtype=t.dtype).nbytes for t in tensors.values())
    assert sizes.num_bytes(on_host=False) == total - host
