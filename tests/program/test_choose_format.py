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


GIB = 1 << 30


class TestPages:
    """`page_format="auto"`: those of the model's dtype, but for speed and memory."""

    @pytest.mark.parametrize(
        ("settings", "pages"),
        [
            ({}, "model"),
            ({"expected_overlap": 0.5}, "model"),  # where the link decides both are as fast
            ({"page_ratio": 8.0, "device_bytes": 30 * GIB}, "model"),
            ({"page_ratio": 8.0, "device_bytes": 20 * GIB}, "stored"),
            ({"page_ratio": 8.0, "device_bytes": 2 * GIB}, "model"),  # neither fits
            ({"offload": "never"}, "model"),
            ({"offload": "never", "device_bytes": 60 * GIB}, "stored"),
            ({"offload": "auto", "device_bytes": 60 * GIB}, "stored"),
            ({"offload": "auto", "device_bytes": 100 * GIB}, "model"),
            ({"kv_format": "model"}, "model"),
            ({"kv_format": "values8", "selector": "lowbit4"}, "model"),
            ({"kv_format": {0: "int8", 1: "values8"}, "selector": "lowbit4"}, "model"),
            ({"kv_format": {0: "int8"}, "page_ratio": 8.0, "device_bytes": 28 * GIB}, "model"),
        ],
    )
    def test_they_are_those_of_the_model_unless_only_others_fit(self, settings, pages):
        layout = chosen(16, **({"kv_format": "int8", "page_format": "auto"} | settings))
        assert layout.config.page_format == pages
        assert layout.page_reason
        assert not layout.format_reason

    def test_they_are_stored_where_that_is_faster(self, monkeypatch):
        fast = dataclasses.replace(MACHINES["h200"], unpack_gnps=1e5)
        monkeypatch.setitem(MACHINES, "h200", fast)
        settings = {"expected_overlap": 1.0, "page_format": "auto"}
        layout = chosen(16, kv_format="int8", **settings)
        assert layout.config.page_format == "stored"
        model, stored = layout.page_reason.rpartition(": ")[2].split(", ")
        assert float(model.removeprefix("model ")) > float(stored.removeprefix("stored "))
        assert chosen(16, kv_format="values8", selector="lowbit4", **settings).page_reason == (
            "such formats have no others"
        )

    def test_why_says_what_both_would_take(self):
        settings = {"kv_format": "int8", "offload": "auto", "device_bytes": 60 * GIB}
        layout = chosen(16, page_format="auto", **settings)
        assert not layout.offload
        plain = dataclasses.replace(layout, config=layout.config.replace(page_format="model"))
        assert layout.page_reason == (
            f"they take {layout.num_bytes(on_host=False):,} bytes of device_bytes={60 * GIB:,}, "
            f"and pages of the model's dtype would take {plain.resident_bytes:,}"
        )


class TestOnTheDevice:
    """`kv_format="auto"` rounds there, on stored pages, what would not fit otherwise."""

    @pytest.mark.parametrize("pages", ["stored", "auto"])
    @pytest.mark.parametrize(
        ("settings", "name", "offload"),
        [
            ({"device_bytes": 100 * GIB}, "model", False),
            ({"device_bytes": 60 * GIB}, "int8", False),
            ({"device_bytes": 30 * GIB, "kv_format": "auto:10"}, "int4", False),
            ({"device_bytes": 30 * GIB}, "int8", True),
            ({"device_bytes": 60 * GIB, "offload": "never"}, "int8", False),
            ({"device_bytes": 60 * GIB, "offload": "never", "kv_format": "auto:0.1"}, "model",
             False),
            ({"device_bytes": 60 * GIB, "mode": "dense"}, "int8", False),
            ({"device_bytes": 60 * GIB, "mode": "speculate"}, "int8", False),
            ({"device_bytes": 60 * GIB, "offload": "always"}, "int8", True),
        ],
    )  # fmt: skip
    def test_the_most_exact_that_fits(self, pages, settings, name, offload):
        asked = {"expected_overlap": 0.5, "offload": "auto", "page_format": pages}
        layout = chosen(16, **(asked | settings))
        assert (layout.config.kv_format, layout.offload) == (name, offload)
        if not offload and name != "model":
            assert layout.config.page_format == "stored"
            assert layout.num_bytes(on_host=False) <= layout.config.device_bytes
            assert f"{layout.num_bytes(on_host=False):,} of device_bytes" in layout.format_reason

    def test_pages_of_the_models_dtype_that_were_asked_for_are_kept(self):
        """In them a format is as large, so the cache moves to CPU memory."""
        layout = chosen(16, expected_overlap=0.5, offload="auto", device_bytes=60 * GIB)
        assert layout.offload
        assert layout.config.page_format == "model"
        assert "page_format='auto' would keep it on the device, in int8" in layout.format_reason

    def test_a_mode_that_needs_the_device_says_what_does_not_fit(self):
        with pytest.raises(ConfigError, match=r"device_bytes=.*mode='speculate'"):
            chosen(16, mode="speculate", offload="auto", page_format="auto", device_bytes=GIB)


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


@pytest.mark.parametrize("change", [{}, {"mode": "exact", "hint": "previous_step"}])
@torch.no_grad()
def test_what_stays_on_the_device_has_the_bits_of_the_same_format_offloaded(
    traced_llama, slow_link, change
):
    ids = torch.randint(0, 256, (2, 450), generator=torch.Generator().manual_seed(2))
    config = slow_link.replace(max_tokens=512, **change)
    sizes = [
        explain(
            traced_llama,
            config.replace(offload="never", kv_format=name, page_format=pages),
            batch_size=2,
        ).device_bytes
        for name, pages in (("model", "model"), ("int8", "stored"))
    ]
    assert sizes[1] < sizes[0]
    stays = {"offload": "auto", "device_bytes": sum(sizes) // 2, "page_format": "auto"}
    runs = []
    for settings in ({"kv_format": "auto", **stays}, {"kv_format": "int8"}):
        module = optimize(traced_llama, config.replace(**settings))
        first = module(ids[:, :420])
        logits = [first.logits[:, -1]]
        for place in range(420, 450):
            step = module(ids[:, place : place + 1], past_key_values=first.past_key_values)
            logits.append(step.logits[:, -1].clone())
        runs.append(torch.stack(logits))
        kv = first.past_key_values.kv
        assert kv.stats().formats == {0: "int8", 1: "int8"}
        assert kv.layout.offload == (settings["kv_format"] == "int8")
    assert torch.equal(*runs)
    report = str(explain(traced_llama, config.replace(kv_format="auto", **stays), batch_size=2))
    assert "written in int8 (auto: the KV cache stays on the device, where it takes" in report
    assert ", in pages too (auto: others are as large in every format)" in report


@pytest.mark.parametrize("length", [400, 384])  # in a block, and at the end of one
@torch.no_grad()
def test_a_cache_that_grows_is_rounded_on_the_device_and_then_moves_out(
    traced_llama, slow_link, length
):
    ids = torch.randint(0, 256, (1, 1500), generator=torch.Generator().manual_seed(1))

    def size(tokens, **settings):
        config = slow_link.replace(offload="never", **settings)
        return explain(traced_llama, config, max_tokens=tokens).device_bytes

    # 512 tokens fit in the model's dtype, 1024 in int8, and 2048 in no format that is allowed.
    most = (max(size(512), size(1024, kv_format="int8", page_format="stored")) + size(1024)) // 2
    assert size(2048, kv_format="int8", page_format="stored") > most
    limit = {"offload": "auto", "device_bytes": most}
    runs = {}
    for name, settings in (
        ("grown", {"kv_format": "auto", "page_format": "auto", **limit}),
        ("rounded", {"kv_format": "int8", "page_format": "model"}),
    ):
        module = optimize(traced_llama, slow_link.replace(**settings))
        cache, seen, logits, begin = None, [], [], 0
        for end in (length, 900, 901, 1400, 1401):
            out = module(ids[:, begin:end], past_key_values=cache)
            cache, begin = out.past_key_values, end
            layout = cache.kv.layout
            seen.append((layout.config.kv_format, layout.config.page_format, layout.offload))
            logits.append(out.logits[:, -1].clone())
        runs[name] = seen, logits
    seen, logits = runs["grown"]
    stays = ("int8", "stored", False)
    assert seen == [("model", "model", False), stays, stays, *[("int8", "model", True)] * 2]
    # A call reads its own tokens as the model made them, and the first one did no more.
    assert torch.equal(torch.stack(logits), torch.stack(runs["rounded"][1]))


@pytest.mark.parametrize("pages", ["model", "auto"])
@torch.no_grad()
def test_a_cache_in_cpu_memory_that_grows_may_be_rounded_then(traced_llama, slow_link, pages):
    ids = torch.randint(0, 256, (1, 920), generator=torch.Generator().manual_seed(4))
    sizes = [
        explain(traced_llama, slow_link, max_tokens=tokens).host_bytes for tokens in (512, 1024)
    ]
    config = slow_link.replace(expected_overlap=1.0, page_format=pages)
    runs = {}
    for name, settings in (
        ("auto", {"kv_format": "auto", "host_bytes": sum(sizes) // 2}),
        ("int8", {"kv_format": "int8"}),
    ):
        module = optimize(traced_llama, config.replace(**settings))
        cache, seen, logits, begin = None, [], [], 0
        for end in (400, 900, *range(901, 920)):
            out = module(ids[:, begin:end], past_key_values=cache)
            cache, begin = out.past_key_values, end
            seen.append(cache.kv.stats().formats[0])
            logits.append(out.logits[:, -1].clone())
        runs[name] = torch.stack(logits)
        assert seen == ([("model" if name == "auto" else "int8"), *["int8"] * 20])
    assert torch.equal(runs["auto"], runs["int8"])
