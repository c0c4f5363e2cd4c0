"""The group of settings that says where the KV cache lives; single values are in `test_config`."""

from __future__ import annotations

import dataclasses

import pytest

from sparda_compile import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.memory import Memory
from sparda_compile.registry import KV_FORMATS


def test_the_group_is_that_of_a_configuration():
    config = SpardaConfig(kv_format="int8", page_format="stored", page_ratio=3.0)
    assert config.memory == Memory(kv_format="int8", page_format="stored", page_ratio=3.0)
    assert Memory().page_format == SpardaConfig().page_format == "model"


@pytest.mark.parametrize("kv_format", ["model", "int8", "fp8", "int4", "auto", {0: "int8"}])
def test_formats_whose_pages_may_hold_runs(kv_format):
    for pages in ("stored", "auto"):
        assert Memory(kv_format=kv_format, page_format=pages).page_format == pages


@pytest.mark.parametrize("kv_format", ["values8", "values4", {0: "int8", 3: "values8"}])
def test_keys_that_stay_are_refused_with_what_to_use(kv_format):
    with pytest.raises(ConfigError) as caught:
        Memory(kv_format=kv_format, page_format="stored")
    sentence = str(caught.value)
    assert "stores values alone" in sentence
    assert "Use page_format='model', or one of fp8, int8, int4." in sentence
    assert dataclasses.replace(Memory(kv_format=kv_format)).page_format == "model"
    assert Memory(kv_format=kv_format, page_format="auto").page_format == "auto"


def test_formats_of_ones_own_are_asked_too():
    class Odd:
        name, rounds, summary = "odd", True, "lowbit4_keys"

    KV_FORMATS.add(Odd())
    try:
        with pytest.raises(ConfigError, match="kv_format='odd'"):
            Memory(kv_format="odd", page_format="stored")
    finally:
        KV_FORMATS.remove("odd")
