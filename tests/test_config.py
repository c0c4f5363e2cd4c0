"""`SpardaConfig`: what it accepts, what it refuses and what follows from it."""

from __future__ import annotations

import dataclasses
import pickle
import re

import numpy as np
import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.config import (
    MACHINE_NAMES,
    Blocks,
    Execution,
    Memory,
    Prediction,
    Selection,
    round_up,
)
from sparda_compile.errors import ConfigError
from sparda_compile.passes.machine import MACHINES
from sparda_compile.registry import SELECTORS

REFUSED = {
    "mode": ("forcast", ["mode='forcast'", "Did you mean 'forecast'?"]),
    "selector": ("quests", ["selector='quests'", "infllm2, quest, nosa", "Did you mean 'quest'?"]),
    "hint": ("emma", ["hint='emma'", "forecast, previous_step, previous_layer"]),
    "prefill": (None, ["prefill=None", "auto, sparse, dense"]),
    "prefill_selector": ("infllm", ["prefill_selector='infllm'", "Did you mean 'infllm2'?"]),
    "prefill_candidates": (0.5, ["prefill_candidates=0.5", "use 1.0 or more, such as 2.0"]),
    "shared_tokens": (3, ["shared_tokens=3", "does not divide block_size=64", "power of two"]),
    "chunk_tokens": (0, ["chunk_tokens=0", "use 1 or more"]),
    "offload": (True, ["offload=True", "always, never"]),
    "eviction": ("random", ["eviction='random'", "lru, fifo"]),
    "lowering": ("inductr", ["lowering='inductr'", "Did you mean 'inductor'?"]),
    "cuda_graph": ("yes", ["cuda_graph='yes'", "True, False"]),
    "progress": ("no", ["progress='no'", "True, False"]),
    "machine": ("h300", ["machine='h300'", "cpu, h100, h200", "Did you mean 'h"]),
    "forecast_rank": (0, ["forecast_rank=0", "use 1 or more"]),
    "forecast_heads": (0, ["forecast_heads=0", "use 1 or more"]),
    "top_k": (-1, ["top_k=-1", "use 0 or more"]),
    "short_list": (-1, ["short_list=-1", "use 0 or more"]),
    "sink_blocks": (-1, ["sink_blocks=-1", "use 0 or more"]),
    "local_blocks": (-2, ["local_blocks=-2", "use 0 or more"]),
    "block_size": (24, ["block_size=24", "multiple of 16", "Use 64"]),
    "pool_stride": (0, ["pool_stride=0", "use 1 or more"]),
    "pool_size": (40, ["pool_stride=16", "pool_size=40"]),
    "max_tokens": (63, ["max_tokens=63", "use 64 or more"]),
    "page_ratio": (0.5, ["page_ratio=0.5", "use 1.0 or more"]),
    "ema_level": (0.0, ["ema_level=0.0", "above 0.0 and at most 1.0"]),
    "ema_trend": (1.1, ["ema_trend=1.1", "above 0.0 and at most 1.0"]),
    "ema_calibrate": ("yes", ["ema_calibrate='yes'", "True, False"]),
    "ema_damping": (-0.1, ["ema_damping=-0.1", "use 0.0 to 1.0"]),
    "speculation_budget": (4.5, ["speculation_budget=4.5", "use 0.0 to 4.0"]),
    "repair": ("merge", ["repair='merge'", "exact, union"]),
    "attend_before_repair": ("never", ["attend_before_repair='never'", "auto, always"]),
    "speculate_where": ("never", ["speculate_where='never'", "auto, always"]),
    "expected_overlap": (1.5, ["expected_overlap=1.5", "use 0.0 to 1.0"]),
    "expected_recall": (-0.5, ["expected_recall=-0.5", "use 0.0 to 1.0"]),
    "device_bytes": (0, ["device_bytes=0", "use 1 or more"]),
    "host_bytes": (-5, ["host_bytes=-5", "use 1 or more"]),
    "page_format": ("int8", ["page_format='int8'", "model, stored"]),
    "kv_format": ("int2", ["kv_format='int2'", "model, fp8, int8, int4"]),
}


@pytest.mark.parametrize("field", REFUSED)
def test_refused_value_is_named_with_what_is_allowed(field):
    value, words = REFUSED[field]
    with pytest.raises(ConfigError) as caught:
        SpardaConfig(**{field: value})
    for word in words:
        assert word in str(caught.value)


def test_every_field_is_refused_or_free():
    free = {"disable_passes", "dump_dir"}  # checked by optimize; any folder will do
    assert {f.name for f in dataclasses.fields(SpardaConfig)} == {*REFUSED, *free}


def test_formats_of_layers_can_be_compared_and_replaced():
    config = SpardaConfig(kv_format={3: "int8", 1: "int4"})
    assert config == SpardaConfig(kv_format={1: "int4", 3: "int8"})
    assert hash(config.replace(top_k=3)) != hash(config)
    assert config.replace(top_k=3).kv_format == ((1, "int4"), (3, "int8"))


def test_a_sparse_prompt_needs_a_mode_that_selects():
    with pytest.raises(ConfigError, match=r"prefill='sparse'.*mode='dense' selects nothing; use"):
        SpardaConfig(mode="dense", prefill="sparse")
    for mode in ("query", "forecast", "exact", "speculate"):
        config = SpardaConfig(mode=mode, prefill="sparse", top_k=None, offload="never")
        assert config.prefill == "sparse"
    assert SpardaConfig(mode="dense").prefill == "auto"


def test_config_error_is_a_value_error():
    with pytest.raises(ValueError, match="mode="):
        SpardaConfig(mode="sparse")


@pytest.mark.parametrize("value", [0, 8, 136, 144, 24, -16])
def test_block_sizes_that_are_refused(value):
    with pytest.raises(ConfigError, match=f"block_size={value} "):
        SpardaConfig(block_size=value)


@pytest.mark.parametrize("value", range(16, 129, 16))
def test_block_sizes_that_are_allowed(value):
    assert SpardaConfig(block_size=value).block_size == value


def test_page_ratio_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="page_ratio=nan"):
        SpardaConfig(page_ratio=float("nan"))


def test_cache_must_be_whole_pages():
    with pytest.raises(ConfigError, match=r"max_tokens=1000 .* use 1024"):
        SpardaConfig(max_tokens=1000, top_k=1)


@pytest.mark.parametrize("top_k", [0, 16, None])
def test_budget_up_to_the_blocks_is_allowed(top_k):
    assert SpardaConfig(max_tokens=1024, top_k=top_k).top_k == top_k


def test_budget_beyond_the_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"top_k=17 .* 16 blocks .* max_tokens=1024"):
        SpardaConfig(max_tokens=1024, top_k=17)


def test_a_short_list_for_prompts_needs_one_for_steps():
    with pytest.raises(ConfigError, match=r"'nosa' has a short list.*'lowbit2' has none; use"):
        SpardaConfig(selector="lowbit2", prefill_selector="nosa")
    nosa = {"selector": "nosa", "top_k": 78, "local_blocks": 16}
    assert SpardaConfig(prefill_selector="nosa", **nosa).prefill_selector == "nosa"
    assert SpardaConfig(prefill_selector="infllm2", **nosa).selector == "nosa"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "query"}, r"selector='infllm2' of prompts .* prefill_selector='lowbit2' or"),
        ({"mode": "query", "selector": "lowbit2", "prefill_selector": "quest"}, "selector='quest'"),
        ({"selector": "lowbit2"}, r"a Forecast of one head is one.* forecast_heads=4"),
        ({"selector": "lowbit4", "forecast_heads": 1}, r"a Forecast of one head is one"),
    ],
)
def test_candidates_are_refused_where_nobody_scores_their_keys_head_by_head(settings, said):
    with pytest.raises(ConfigError, match=rf"prefill_candidates=2\.0 are .*{said}"):
        SpardaConfig(prefill_candidates=2.0, **settings)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "2", True])
def test_candidates_are_a_number(value):
    with pytest.raises(ConfigError, match="prefill_candidates="):
        SpardaConfig(mode="query", selector="lowbit2", prefill_candidates=value)


def test_candidates_are_beside_the_blocks_that_are_always_read():
    query = {"mode": "query", "selector": "lowbit2", "top_k": 62}
    found = SpardaConfig(prefill_candidates=1.5, **query)
    assert (found.num_proposed, found.num_candidates(1000)) == (93, 34 + 93)
    assert found.num_candidates(100) == 100
    assert found.replace(mode="forecast", forecast_heads=4).num_candidates(1000) == 127
    for none in ({"prefill_candidates": None}, {"mode": "dense"}, {"top_k": None}):
        assert found.replace(**none).num_candidates(1000) == 0


def test_short_list_within_the_budget_is_allowed():
    nosa = SpardaConfig(selector="nosa", top_k=78, local_blocks=16)
    assert (nosa.short_list, nosa.num_selected(10_000)) == (23, 96)
    assert nosa.replace(top_k=23).top_k == 23
    assert nosa.replace(top_k=None, short_list=100).short_list == 100
    assert SpardaConfig(selector="quest", top_k=4).short_list == 23


def test_short_list_beyond_the_budget_is_refused():
    with pytest.raises(ConfigError, match=r"short_list=23 .* top_k=5 .* short_list of 0 to 5"):
        SpardaConfig(selector="nosa", top_k=5)


def test_defaults_are_the_published_constants():
    config = SpardaConfig()
    assert (config.block_size, config.pool_size, config.pool_stride) == (64, 32, 16)
    assert (config.sink_blocks, config.local_blocks, config.top_k) == (1, 32, 62)
    assert config.num_selected(10_000) == 96


@pytest.mark.parametrize(
    ("settings", "num_blocks", "expected"),
    [
        ({"top_k": 2, "sink_blocks": 1, "local_blocks": 3}, 100, 7),
        ({"top_k": 2, "sink_blocks": 1, "local_blocks": 3}, 5, 5),
        ({"top_k": 0, "sink_blocks": 0, "local_blocks": 0}, 100, 1),
        ({"top_k": None}, 100, 100),
        ({"mode": "dense", "top_k": 2}, 100, 100),
    ],
)
def test_selected_blocks(settings, num_blocks, expected):
    assert SpardaConfig(**settings).num_selected(num_blocks) == expected


@pytest.mark.parametrize(
    ("mode", "hint", "expected"),
    [
        ("forecast", "previous_step", True),
        ("exact", "forecast", True),
        ("exact", "previous_step", False),
        ("query", "forecast", False),
        ("dense", "forecast", False),
    ],
)
def test_who_needs_forecast_weights(mode, hint, expected):
    assert SpardaConfig(mode=mode, hint=hint).needs_forecast is expected


def test_it_is_frozen_and_keyword_only_and_hashable():
    config = SpardaConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3
    with pytest.raises(TypeError):
        SpardaConfig("query")
    assert config == SpardaConfig()
    assert len({config, SpardaConfig(), SpardaConfig(top_k=1)}) == 2
    assert pickle.loads(pickle.dumps(config)) == config


def test_replace_checks_again():
    config = SpardaConfig(max_tokens=4096)
    assert config.replace(top_k=3).top_k == 3
    assert config.top_k == 62
    with pytest.raises(ConfigError, match="top_k=65"):
        config.replace(top_k=65)
    with pytest.raises(TypeError, match="topk"):
        config.replace(topk=3)


def test_names_are_those_that_exist():
    assert set(MACHINE_NAMES) == set(MACHINES)
    own = ("infllm2", "quest", "nosa", "lowbit2", "lowbit4")
    assert set(own) <= set(SELECTORS.choices())
    scorers = {SpardaConfig(selector=name).forecast_selector for name in own}
    assert scorers == {"forecast", *(f"{name}_forecast" for name in own[2:])}
    assert {*own, *scorers} <= set(SELECTORS.names())
    assert {SpardaConfig(selector=n, forecast_heads=2).forecast_selector for n in own} == {*own}


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_round_up(value, expected):
    assert round_up(value, 64) == expected


class CheckpointConfig:
    """A model's config, as far as block sizes go."""

    def __init__(self, **sparse_config):
        self.sparse_config = sparse_config


MINICPM = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
}


def test_block_sizes_are_read_from_the_model():
    config = SpardaConfig.from_model(CheckpointConfig(**MINICPM), mode="query")
    assert config == SpardaConfig(mode="query", top_k=64, local_blocks=32)
    changed = MINICPM | {"window_size": 512, "block_size": 32, "init_blocks": 2, "kernel_size": 16}
    config = SpardaConfig.from_model(CheckpointConfig(**changed), top_k=5)
    assert (config.local_blocks, config.block_size, config.sink_blocks) == (16, 32, 2)
    assert (config.pool_size, config.top_k) == (16, 5)
    assert SpardaConfig.from_model(CheckpointConfig(topk=9)) == SpardaConfig(top_k=9)
    retained = CheckpointConfig(**(MINICPM | {"window_size": 1024, "topk": 80}))
    config = SpardaConfig.from_model(retained, selector="nosa")
    assert (config.top_k, config.local_blocks, config.short_list) == (80, 16, 23)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window_size": 2000}, "2000 tokens is no whole number of blocks of block_size=64"),
        ({"topk": "many"}, "'topk'.*='many' is not a whole number"),
        ({"kernel_stride": -16}, "'kernel_stride'.*=-16"),
        ({"block_size": 0}, "no whole number of blocks of block_size=0"),
        ({"block_size": 24, "window_size": 48}, "block_size=24 is not allowed"),
    ],
)
def test_sizes_of_a_model_that_are_not_allowed(changes, words):
    with pytest.raises(ConfigError, match=words):
        SpardaConfig.from_model(CheckpointConfig(**(MINICPM | changes)))


def test_model_without_block_sizes():
    for model_config in (object(), CheckpointConfig()):
        with pytest.raises(ConfigError, match="has no sparse_config"):
            SpardaConfig.from_model(model_config)


class TestGroups:
    def test_fields_are_those_of_the_groups_once_each(self):
        groups = (Selection, Prediction, Blocks, Memory, Execution)
        names = [field.name for group in groups for field in dataclasses.fields(group)]
        assert len(names) == len(set(names))
        assert set(names) == {field.name for field in dataclasses.fields(SpardaConfig)}

    def test_groups_are_given_and_given_back(self):
        memory = Memory(offload="never", page_ratio=2.0)
        config = SpardaConfig.of(memory, Selection(mode="query"), top_k=5)
        assert config == SpardaConfig(mode="query", offload="never", page_ratio=2.0, top_k=5)
        assert config.memory == memory
        assert config.selection == Selection(mode="query", top_k=5)
        assert config.blocks == Blocks()
        assert config.prediction == Prediction()
        assert config.execution == Execution()

    def test_what_is_no_group_is_refused(self):
        with pytest.raises(ConfigError, match="3 is no group of settings; give Selection"):
            SpardaConfig.of(3)

    def test_two_of_a_kind_are_refused(self):
        with pytest.raises(ConfigError, match="two groups of the kind Memory"):
            SpardaConfig.of(Memory(), Memory())

    @pytest.mark.parametrize(
        ("group", "fields"),
        [
            (Selection, {"mode": "forcast"}), (Selection, {"top_k": -1}),
            (Blocks, {"block_size": 60}), (Memory, {"page_ratio": 0.5}),
            (Execution, {"lowering": "fast"}),
        ],
    )  # fmt: skip
    def test_a_group_checks_its_own(self, group, fields):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            group(**fields)
        with pytest.raises(ConfigError, match=next(iter(fields))):
            SpardaConfig(**fields)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("top_k", "3", "is not a whole number; use 0 or more"),
        ("top_k", 2.5, "is not a whole number"),
        ("top_k", True, "is not a whole number"),
        ("block_size", 64.0, "is not a whole number"),
        ("pool_size", 0, "is too small; use 1 or more"),
        ("pool_stride", "16", "is not a whole number"),
        ("sink_blocks", None, "is not a whole number"),
        ("short_list", -1, "is too small"),
        ("forecast_rank", 1.0, "is not a whole number"),
        ("forecast_heads", True, "is not a whole number"),
        ("max_tokens", 1 << 62, "is too large; use 1 to 2147483647"),
        ("max_tokens", "many", "is not a whole number"),
        ("device_bytes", 1e9, "is not a whole number"),
        ("host_bytes", float("nan"), "is not a whole number"),
        ("chunk_tokens", 64.0, "is not a whole number"),
        ("page_ratio", float("inf"), "is not a finite number"),
        ("page_ratio", float("nan"), "is not a finite number"),
        ("page_ratio", "2", "is not a finite number"),
        ("expected_overlap", None, "is not a finite number"),
        ("expected_recall", "0.5", "is not a finite number"),
        ("disable_passes", "fuse_selection", "is not a tuple of names"),
        ("disable_passes", ["fuse_selection"], "is not a tuple of names"),
        ("disable_passes", (1,), "is not a tuple of names"),
        ("dump_dir", "", "is no folder's path"),
        ("dump_dir", 3, "is no folder's path"),
        ("page_ratio", 10**400, "is not a finite number"),
        ("top_k", 10**400, "is too large; use 0 to 9223372036854775807"),
        ("mode", np.array(["query", "dense"]), "is not known"),
        ("cuda_graph", torch.tensor([1, 0]), "is no switch"),
        ("mode", None, "is not known"),
        ("selector", ["quest"], "is not known"),
        ("machine", 7, "is not known"),
    ],
)
def test_every_field_is_checked_for_type_and_range(field, value, words):
    with pytest.raises(ConfigError, match=rf"(?s)^{field}=.*{re.escape(words)}"):
        SpardaConfig(**{field: value})


@pytest.mark.parametrize("kind", [SpardaConfig, Memory])
def test_numbers_of_numpy_are_kept_as_plain_ones(kind):
    config = kind(chunk_tokens=np.int64(16), page_ratio=np.float32(2.0))
    assert config == kind(chunk_tokens=16, page_ratio=2.0)
    assert (type(config.chunk_tokens), type(config.page_ratio)) == (int, float)
