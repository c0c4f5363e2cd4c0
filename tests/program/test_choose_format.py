"""What `kv_format="auto"` stands for: by batch size, overlap, error, memory and place."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile import SpardaConfig, explain, optimize
from sparda_compile.errors import ConfigError
from sparda_compile.passes.machine import MACHINES
from sparda_compile.program.choose_format import with_format
from sparda_compile.state.layout import CacheLayout, LayerShape

# A model of 8 billion weights in 16 bits, 36 layers with 2 KV heads, at 128K tokens.
SHAPES = tuple(LayerShape(n, "sparse", 2, 128, 0, torch.bfloat16) for n in range(36))
WEIGHT_BYTES = 16_400_000_000
SMALL = {"block_size": 16, "pool_size": 8, "pool_stride": 4, "local_blocks": 1, "top_k": 2}


def chosen(batch_size, machine="h200", dtype=torch.bfloat16, **settings):
    """Return the layout for a batch of that model."""
    shapes = SHAPES
    if dtype is not torch.bfloat16:
        shapes = tuple(LayerShape(n, "sparse", 2, 128, 0, dtype) for n in range(36))
    config = SpardaConfig(**({"mode": "forecast", "kv_format": "auto"} | settings))
    layout = CacheLayout(config, shapes, batch_size, 131_072)
    return with_format(layout, MACHINES[machine], WEIGHT_BYTES)


@pytest.mark.parametrize(
    ("batch_size", "settings", "name"),
    [
        (1, {}, "model"),
        (1, {"expected_overlap": 0.5}, "model"),
        (16, {"expected_overlap": 0.95}, "model"),
        (16, {"expected_overlap": 0.5}, "int8"),
        (16, {"expected_overlap": 0.5, "kv_format": "auto:1"}, "int8"),
        (16, {"expected_overlap": 0.5, "kv_format": "auto:0.1"}, "model"),
        (16, {"expected_overlap": 0.5, "kv_format": "auto:10"}, "int4"),
        # Keys are on the device with this selector, and values in 8 bits are nearer than in 4.
        (16, {"expected_overlap": 0.5, "kv_format": "auto:10", "selector": "lowbit4"}, "values8"),
        # A page that holds a run has no place for keys that are elsewhere.
        (
            16,
            {
                "expected_overlap": 0.5,
                "kv_format": "auto:10",
                "selector": "lowbit4",
                "page_format": "stored",
            },
            "int8",  # to unpack takes as long as with int4
        ),
        (16, {"expected_overlap": 0.5, "page_format": "stored"}, "int8"),
        (16, {"expected_overlap": 0.5, "page_format": "stored", "offload": "never"}, "model"),
        (16, {"expected_overlap": 0.5, "offload": "never"}, "model"),
        (16, {"expected_overlap": 0.5, "offload": "auto", "device_bytes": 1 << 40}, "model"),
        (16, {"expected_overlap": 0.5, "offload": "auto", "device_bytes": 1 << 35}, "int8"),
        (16, {"expected_overlap": 0.5, "mode": "dense"}, "model"),
        (1, {"host_bytes": 3 << 30}, "int8"),
        (16, {"expected_overlap": 0.5, "dtype": torch.float64}, "model"),
    ],
)
def test_the_most_exact_that_is_about_as_fast_as_any(batch_size, settings, name):
    layout = chosen(batch_size, **settings)
    assert layout.config.kv_format == name
    assert {layout.kv_format(layer).name for layer in range(36)} == {name}
    assert layout.format_reason


def test_steps_are_near_what_an_h200_takes():
    """Measured in mode `forecast`: 20.5, 11.7 and 7.4 ms."""
    for overlap, name, measured in ((0.5, "model", 20.5), (0.5, "fp8", 11.7), (0.9, "model", 7.4)):
        reason = chosen(16, expected_overlap=overlap).format_reason
        steps = dict(each.split() for each in reason.rpartition(": ")[2].split(", "))
        assert float(steps[name]) == pytest.approx(measured, rel=0.2)


def test_what_is_named_is_not_chosen_anew():
    layout = chosen(16, kv_format={0: "fp8"}, expected_overlap=0.5)
    assert layout.config.kv_format == ((0, "fp8"),)
    assert not layout.format_reason


@pytest.mark.parametrize("text", ["auto:", "auto:much", "auto:0", "auto:101", "auto:nan"])
def test_a_percent_that_is_none_is_refused(text):
    if text == "auto:":
        text = "auto: "
    with pytest.raises(ConfigError, match=r"kv_format='auto:.*'auto:10'"):
        SpardaConfig(kv_format=text)
    with pytest.raises(ConfigError, match=r"'autos'.*auto"):
        SpardaConfig(kv_format="autos")


@pytest.fixture
def slow_link(monkeypatch):
    """Plan for a machine whose link is all that takes time."""
    slow = dataclasses.replace(MACHINES["cpu"], link_gbps=1e-4)
    monkeypatch.setitem(MACHINES, "cpu", slow)
    return SpardaConfig(
        **SMALL, mode="query", lowering="eager", machine="cpu", prefill="dense",
        expected_overlap=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(("asked", "name"), [("auto", "int8"), ("auto:10", "int4")])
def test_a_module_runs_as_with_the_format_that_is_named(traced_llama, slow_link, asked, name):
    ids = torch.randint(0, 256, (2, 90), generator=torch.Generator().manual_seed(0))
    runs = {}
    for each in (asked, name, "model"):
        module = optimize(traced_llama, slow_link.replace(kv_format=each))
        out = module.generate(
            ids, max_new_tokens=20, output_logits=True, return_dict_in_generate=True
        )
        runs[each] = torch.stack(out.logits), module.sparda.stats()
    assert torch.equal(runs[asked][0], runs[name][0])
    assert not torch.equal(runs[asked][0], runs["model"][0])
    assert runs[asked][1].to_dict() == runs[name][1].to_dict()
    assert runs[asked][1].formats == {0: name, 1: name}
    assert f"Full blocks are written in {name}." in str(runs[asked][1])


def test_explain_names_what_was_chosen_and_why(traced_llama, slow_link):
    report = explain(traced_llama, slow_link.replace(kv_format="auto"), max_tokens=1024)
    assert report.kv_format.startswith("int8 (auto: milliseconds a step at an overlap of 0: model ")
    assert f"written in {report.kv_format}" in str(report)
    assert report.to_dict()["kv_format"] == report.kv_format
    exact = explain(traced_llama, slow_link, max_tokens=1024)
    assert 0.25 < report.host_bytes / exact.host_bytes < 0.5


@torch.no_grad()
def test_a_cache_that_outgrows_the_device_is_rounded_then(traced_llama, slow_link):
    """Not before: on the device it has the model's dtype, and gives what that gives."""
    ids = torch.randint(0, 256, (1, 700), generator=torch.Generator().manual_seed(1))
    resident = slow_link.replace(offload="never")
    small, large = (explain(traced_llama, resident, max_tokens=n).device_bytes for n in (512, 1024))
    limit = {"offload": "auto", "device_bytes": (small + large) // 2}
    runs = {}
    for name in ("auto", "model", "int8"):
        module = optimize(traced_llama, slow_link.replace(kv_format=name, **limit))
        first = module(ids[:, :400])
        before = first.past_key_values.kv.stats().formats
        second = module(ids[:, 400:690], past_key_values=first.past_key_values)
        cache = second.past_key_values
        assert cache.kv.layout.offload
        third = module(ids[:, 690:691], past_key_values=cache)
        runs[name] = first.logits, third.logits, before[0], cache.kv.stats().formats[0]
    assert runs["auto"][2:] == ("model", "int8")
    assert torch.equal(runs["auto"][0], runs["model"][0])
    assert not torch.equal(runs["auto"][1], runs["model"][1])
    # From then on its blocks are those of a cache that was rounded from the beginning.
    torch.testing.assert_close(runs["auto"][1], runs["int8"][1], rtol=0, atol=0.1)
