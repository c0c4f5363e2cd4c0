from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from sparda_compile.bench import baselines
from sparda_compile.bench.baselines import StaticDecode, bench_baselines, fill_static, summary
from sparda_compile.bench.decode import DecodeBench, DecodeSetting
from sparda_compile.bench.memory import FreeMemory
from sparda_compile.capture.cache_name import CACHE_NAME

SMALL = {"lowering": "eager", "top_k": 4, "local_blocks": 2}
ROOMY = FreeMemory(1 << 40, 1 << 40)


@pytest.fixture(scope="module")
def bench(lab):
    setting = DecodeSetting(2, 2048, variants=("scheduled",), rounds=1, steps=1, settings=SMALL)
    bench = DecodeBench(lab.captures, setting, lambda text: None)
    bench.check()
    return bench


def run_of(model, cache=StaticCache):
    filled = fill_static(cache(config=model.config, max_cache_len=256), model, 2)
    return StaticDecode(model, filled, torch.tensor([[7], [9]]), 100)


def test_static_decode_attends_to_what_was_filled_and_no_more(lab):
    run = run_of(lab.model)
    logits = run.logits()
    run.rewind()
    dynamic = DynamicCache(config=lab.model.config)
    for index, layer in enumerate(run.cache.layers):
        dynamic.update(layer.keys[:, :, :100].clone(), layer.values[:, :, :100].clone(), index)
    with torch.no_grad():
        wanted = [
            lab.model(input_ids=run.input_ids, **{CACHE_NAME: dynamic}).logits for _ in logits
        ]
    torch.testing.assert_close(logits, torch.stack(wanted).float(), atol=0.02, rtol=0.02)


def test_steps_repeat_after_a_rewind(lab):
    run = run_of(lab.model)
    first = run.logits()
    assert len(run.turn(3)) == 3
    assert int(run.cache.layers[0].cumulative_length) == 100 + 4 + 3
    assert torch.equal(run.logits(), first)
    assert len({float(step.sum()) for step in first}) == len(first)


def test_two_caches_get_the_same_content(lab):
    one, other = run_of(lab.model).cache, run_of(lab.model).cache
    for a, b in zip(one.layers, other.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    assert not torch.equal(one.layers[0].keys, one.layers[1].keys)
    assert not torch.equal(one.layers[0].keys, one.layers[0].values)


def test_whole_forward_compiles_with_a_static_cache(lab, monkeypatch):
    used = {}

    def compile_(forward, **options):
        used.update(options)
        return real(forward, backend="eager", fullgraph=options["fullgraph"])

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    run = run_of(lab.model)
    compiled = StaticDecode(baselines._compiled(lab.model), run.cache, run.input_ids, 100)
    difference = baselines._difference(compiled.logits(), run.logits())
    assert used == {"mode": "reduce-overhead", "fullgraph": True}
    assert difference < 0.01


class Racy(StaticCache):
    """Wrong until it is repaired as `needs` says."""

    needs = "none"
    error = 1.0

    def __init__(self, model, max_tokens, repair):
        super().__init__(config=model.config, max_cache_len=max_tokens)
        self.repair = repair

    def update(self, key_states, value_states, *args, **kwargs):
        order = ("none", "wait", "synchronize", "never")
        if order.index(self.repair) < order.index(self.needs):
            value_states = value_states + self.error
        return super().update(key_states, value_states, *args, **kwargs)


@pytest.mark.parametrize(
    ("needs", "compared", "repair"),
    [
        ("none", "offloaded", None),
        ("wait", "offloaded_repaired", "wait"),
        ("synchronize", "offloaded_repaired", "synchronize"),
        ("never", None, "synchronize"),
    ],
)
def test_offloaded_cache_is_repaired_as_little_as_it_needs(
    lab, bench, monkeypatch, needs, compared, repair
):
    monkeypatch.setattr(Racy, "needs", needs)
    monkeypatch.setattr(baselines, "OffloadedCache", Racy)
    monkeypatch.setattr(baselines, "_compiled", lambda model: model)
    monkeypatch.setattr(baselines, "free_everything", lambda: None)
    found = bench_baselines(bench, lab.model, lab.shape, ROOMY)
    assert found["offloaded_compared"] == compared
    assert found["offloaded"]["agrees"] is (needs == "none")
    assert found.get("offloaded_repaired", {}).get("repair") == repair
    tried = baselines._REPAIRS[: baselines._REPAIRS.index(repair or "none") + 1]
    differences = found["offloaded_repaired" if repair else "offloaded"]["difference_by_repair"]
    assert tuple(differences) == tried
    assert [name for name, value in differences.items() if value == 0.0] == (
        [needs] if compared else []
    )
    assert (found["offloaded_over_scheduled"] is None) == (compared is None)
    assert found["static"]["relative_difference"] == 0.0
    ours = found["scheduled"]["median"]
    assert found["static_over_scheduled"] == round(found["static"]["median"] / ours, 3)
    assert found["skipped"] == {}


def test_what_differs_no_more_than_the_compiled_cache_does_agrees(lab, bench, monkeypatch):
    def rounded(model):
        return lambda **inputs: SimpleNamespace(logits=model(**inputs).logits * 1.01)

    monkeypatch.setattr(Racy, "needs", "never")
    monkeypatch.setattr(baselines, "OffloadedCache", Racy)
    monkeypatch.setattr(baselines, "_compiled", rounded)
    monkeypatch.setattr(baselines, "free_everything", lambda: None)
    for error, agrees in ((0.01, True), (1.0, False)):
        monkeypatch.setattr(Racy, "error", error)
        found = bench_baselines(bench, lab.model, lab.shape, ROOMY)
        assert found["static"]["relative_difference"] == pytest.approx(0.01, rel=0.1)
        assert found["offloaded"]["agrees"] is agrees
        assert found["offloaded"]["relative_difference"] > 0.0


def test_caches_that_do_not_fit_are_left_out(lab, setting):
    told = []
    setting = dataclasses.replace(setting, variants=("scheduled",))
    bench = DecodeBench(lab.captures, setting, told.append)
    found = bench_baselines(bench, lab.model, lab.shape, FreeMemory(0, 1 << 40))
    assert set(found["skipped"]) == {"static", "offloaded"}
    assert "static" not in found
    assert any("static is left out: a static cache needs" in text for text in told)


def test_offloaded_cache_needs_cpu_memory():
    assert baselines._skipped(10, FreeMemory(20, 20)) == {}
    assert list(baselines._skipped(10, FreeMemory(20, 19))) == ["offloaded"]
    assert list(baselines._skipped(10, FreeMemory(19, 20))) == ["offloaded"]


def test_summary_without_offloaded():
    found = summary({"scheduled": [2.0], "static": [5.0]}, {"static": {"eager_noise": 0.0}})
    assert found["static_over_scheduled"] == 2.5
    assert "offloaded_over_scheduled" not in found


def test_logits_that_are_no_numbers_are_not_equal():
    assert baselines._difference(torch.tensor([float("nan")]), torch.ones(1)) is None
    assert baselines._difference(torch.tensor([3.0]), torch.tensor([2.0])) == 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("repair", ["wait", "synchronize"])
def test_repaired_cache_equals_the_static_one(repair):
    from sparda_compile.bench.shapes import SHAPES, build_model

    device = torch.device("cuda")
    model = build_model(SHAPES["tiny"], device, torch.bfloat16)
    ids = torch.tensor([[7], [9]], device=device)
    static = fill_static(StaticCache(config=model.config, max_cache_len=4096), model, 2)
    offloaded = fill_static(baselines.OffloadedCache(model, 4096, repair), model, 2)
    logits = [StaticDecode(model, cache, ids, 4000).logits() for cache in (static, offloaded)]
    assert torch.equal(*logits)
    assert offloaded.layers[1].keys.device.type == "cpu"
