"""What `kv_format="auto"` stands for: by batch size, overlap, error, memory and place."""

from __future__ import annotations

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


def test_a_module_runs_as_with_the_format_that_is_named(traced_llama):
    ids = torch.randint(0, 256, (2, 90), generator=torch.Generator().manual_seed(0))
    settings = {"mode": "query", "lowering": "eager", "machine": "h200", "expected_overlap": 0.0}
    base = SpardaConfig(**SMALL, **settings)
    runs = {}
    for name in ("auto:10", "int4", "model"):
        module = optimize(traced_llama, base.replace(kv_format=name, block_size=16))
        out = module.generate(
            ids, max_new_tokens=20, output_logits=True, return_dict_in_generate=True
        )
        runs[name] = torch.stack(out.logits), module.sparda.stats()
    found = set(runs["auto:10"][1].formats.values())
    assert len(found) == 1
    (name,) = found
    assert torch.equal(runs["auto:10"][0], runs[name][0])
    assert runs[name][1].to_dict()["kv_format"] == {"0": name, "1": name}
    assert ("Full blocks are written in" in str(runs["auto:10"][1])) == (name != "model")


def test_explain_names_what_was_chosen_and_why(traced_llama):
    config = SpardaConfig(**SMALL, mode="query", machine="h200", kv_format="auto")
    report = explain(traced_llama, config, batch_size=4, max_tokens=1024)
    name, _, reason = report.kv_format.partition(" (auto: ")
    assert name in ("model", "int8", "fp8")
    assert "milliseconds a step at an overlap of 0.9: model" in reason
    assert f"written in {report.kv_format}" in str(report)
