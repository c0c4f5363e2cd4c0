from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile.bench.decode import VARIANTS, DecodeBench, DecodeSetting
from sparda_compile.errors import ConfigError

TIMES = ("median", "low", "high", "runs", "h2d_bytes", "predicted_us")


def test_result_has_each_variant_at_each_overlap(lab, setting, roomy):
    told = []
    bench = DecodeBench(lab.captures, setting, told.append)
    bench.check()
    first, result = bench.measure()
    assert list(first["by_overlap"]) == ["0.0"]
    assert list(result["by_overlap"]) == ["0.0", "1.0"]
    assert first["by_overlap"]["0.0"] == result["by_overlap"]["0.0"]
    for row in result["by_overlap"].values():
        assert all(tuple(row[variant]) == TIMES for variant in VARIANTS)
        assert row["scheduled"]["runs"] == setting.rounds * setting.steps
        us = {variant: row[variant]["median"] for variant in VARIANTS}
        assert row["inline_over_scheduled"] == round(us["inline"] / us["scheduled"], 3)
        assert row["scheduled_over_body"] == round(us["scheduled"] / us["body"], 3)
        assert row["floor_us"] == round(max(us["resident"], row["link_us"]), 1)
        assert row["tokens_per_s"] == round(2e6 / us["scheduled"], 1)
        assert row["scheduled"]["h2d_bytes"] == row["inline"]["h2d_bytes"]
        predicted = {variant: row[variant]["predicted_us"] for variant in VARIANTS}
        assert 0 < predicted["body"] < predicted["resident"] < predicted["scheduled"]
        assert row["resident"]["h2d_bytes"] == row["dense"]["h2d_bytes"] == 0
    # Without overlap every scored block is new; with overlap 1 none is.
    block_bytes = 2 * 64 * 16 * 2
    moved = {o: row["scheduled"]["h2d_bytes"] for o, row in result["by_overlap"].items()}
    layers, batch, groups, scored = 2, 2, 2, 4
    assert moved["1.0"] == 0
    assert 0 < moved["0.0"] <= layers * batch * groups * scored * block_bytes
    assert "batch 2: overlap 1.0" in told
    assert set(result["build_s"]) == set(VARIANTS)


def test_a_mode_is_that_of_every_variant_but_dense(lab, setting, roomy):
    mode = {"mode": "exact", "hint": ("ema", "forecast")}
    variants = ("scheduled", "inline", "resident", "dense")
    setting = dataclasses.replace(setting, variants=variants, settings={**setting.settings, **mode})
    bench = DecodeBench(lab.captures, setting, lambda text: None)
    modes = {name: p.plan.layout.config.mode for name, p in bench.programs.items()}
    assert modes == {"scheduled": "exact", "inline": "exact", "resident": "exact", "dense": "dense"}
    bench.check()
    *_, result = bench.measure()
    row = result["by_overlap"]["0.0"]
    assert row["scheduled"]["h2d_bytes"] > 0 == row["resident"]["h2d_bytes"]
    us = {name: row[name]["median"] for name in variants}
    if us["inline"] > us["resident"]:
        exposed = (us["scheduled"] - us["resident"]) / (us["inline"] - us["resident"])
        assert row["exposed_over_inline"] == round(exposed, 3)
    else:
        assert "exposed_over_inline" not in row


def test_programs_that_disagree_are_not_timed(lab, setting, roomy):
    setting = dataclasses.replace(setting, variants=("scheduled", "resident"))
    bench = DecodeBench(lab.captures, setting, lambda text: None)
    pages = next(t for n, t in bench.caches["resident"].state.items() if "pages" in n)
    pages.neg_()
    with pytest.raises(AssertionError, match="resident and scheduled"):
        bench.check()


def test_turn_begins_at_the_first_step(lab, setting):
    setting = dataclasses.replace(setting, variants=("scheduled",), steps=3)
    bench = DecodeBench(lab.captures, setting, lambda text: None)
    bench.prepare(0.5)
    for _ in range(2):
        assert len(bench.turn("scheduled")) == 3
        assert bench.caches["scheduled"].lengths() == [setting.num_tokens + 4 + 3] * 2


def test_same_step_gives_the_same_logits_after_a_turn(lab, setting):
    setting = dataclasses.replace(setting, variants=("resident",))
    bench = DecodeBench(lab.captures, setting, lambda text: None)
    bench.check()
    bench.prepare(0.5)
    first = bench.run("resident")
    bench.turn("resident")
    bench.prepare(0.5)
    assert torch.equal(bench.run("resident"), first)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": ("scheduled", "fast")}, "use some of scheduled, inline"),
        ({"variants": ("scheduled", "scheduled")}, "named twice"),
        ({"overlaps": (0.5, 1.5)}, "0.0 to 1.0"),
        ({"steps": 93}, "use 1 to 92"),
        ({"steps": 0}, "use 1 to 92"),
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"rounds": 0}, "rounds=0 is too small"),
    ],
)
def test_setting_that_cannot_be(changes, words):
    with pytest.raises(ConfigError, match=words):
        DecodeSetting(**{"batch_size": 1, **changes})
