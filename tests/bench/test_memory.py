from __future__ import annotations

import dataclasses
import gc

import pytest

from sparda_compile.bench import memory
from sparda_compile.bench.memory import (
    GIB,
    FreeMemory,
    dense_kv_bytes,
    largest_batch,
    layout_of,
    misfits,
    pinned_region_bytes,
    too_big,
)
from sparda_compile.bench.programs import KNOBS, build_program
from sparda_compile.bench.shapes import SHAPES

TOKENS = 131072
VARIANTS = ("scheduled", "inline", "resident", "dense", "body")


def layouts(batch, shape="8b"):
    return {v: layout_of(SHAPES[shape], v, batch, TOKENS, 96) for v in KNOBS}


@pytest.mark.parametrize("variant", KNOBS)
def test_layout_is_that_of_the_program(lab, variant):
    settings = {"top_k": 4, "local_blocks": 2}
    plan = build_program(lab.captures, variant, 3, 1024, 8, **settings).plan
    assert layout_of(lab.shape, variant, 3, 1024, 8, **settings) == plan.layout


def test_keys_and_values_of_the_published_shapes():
    assert dense_kv_bytes(SHAPES["8b"], 1, TOKENS) == 4 * GIB
    assert dense_kv_bytes(SHAPES["8b-8kv"], 4, TOKENS) == 64 * GIB


def test_too_big():
    assert too_big("it", 5, "CPU", 5) is None
    reason = too_big("it", 3 * GIB, "CPU", GIB)
    assert reason == "it needs 3.0 GiB of CPU memory, and 1.0 GiB are to be had"


@pytest.mark.parametrize(("free", "region"), [(500, 16), (20, 5), (2, 1), (0, 1)])
def test_region_to_draw_blocks_from(monkeypatch, free, region):
    now = classmethod(lambda cls: FreeMemory(0, free * GIB))
    monkeypatch.setattr(memory.FreeMemory, "now", now)
    assert pinned_region_bytes() == region * GIB


def test_everything_fits():
    assert misfits(VARIANTS, layouts(16), FreeMemory(120 * GIB, 100 * GIB)) == {}


def test_resident_and_dense_are_left_out_together():
    found = misfits(VARIANTS, layouts(16), FreeMemory(60 * GIB, 100 * GIB))
    assert list(found) == ["resident", "dense"]
    assert "device memory" in found["dense"]


def test_offloaded_variants_need_cpu_memory():
    found = misfits(VARIANTS, layouts(16), FreeMemory(120 * GIB, 60 * GIB))
    assert list(found) == ["scheduled", "inline"]
    assert "64.0 GiB of CPU memory" in found["inline"]


def test_variants_are_on_the_device_together():
    need = layouts(1)
    both = sum(need[v].num_bytes(on_host=False) for v in ("scheduled", "resident"))
    assert misfits(VARIANTS, need, FreeMemory(both, 100 * GIB)) == {}
    assert list(misfits(VARIANTS, need, FreeMemory(both - 1, 100 * GIB))) == ["resident", "dense"]


@pytest.mark.parametrize(
    ("variant", "free", "limited_by"),
    [
        ("resident", FreeMemory(100 * GIB, 100 * GIB), "budget"),
        ("scheduled", FreeMemory(100 * GIB, 200 * GIB), "budget"),
        ("scheduled", FreeMemory(100 * GIB, 20 * GIB), "CPU memory"),
        ("scheduled", FreeMemory(4 * GIB, 200 * GIB), "device memory"),
    ],
)
def test_largest_batch_is_the_largest(variant, free, limited_by):
    def layout_for(batch):
        return layout_of(SHAPES["8b"], variant, batch, TOKENS)

    found = largest_batch(layout_for, 8 * GIB, free)
    assert found.limited_by == limited_by
    assert found.batch_size > 0
    limits = (min(8 * GIB, free.device), free.host)
    for batch, fits in ((found.batch_size, True), (found.batch_size + 1, False)):
        needs = [layout_for(batch).num_bytes(on_host=on_host) for on_host in (False, True)]
        assert all(n <= limit for n, limit in zip(needs, limits, strict=True)) is fits
    assert found.host_bytes == layout_for(found.batch_size).num_bytes(on_host=True)


def test_not_one_sequence_fits():
    found = largest_batch(
        lambda batch: layout_of(SHAPES["8b"], "resident", batch, TOKENS), GIB,
        FreeMemory(100 * GIB, 100 * GIB),
    )  # fmt: skip
    assert dataclasses.astuple(found) == (0, "budget", 0, 0)


def test_free_memory_keeps_a_reserve(monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 50 * GIB)
    monkeypatch.setattr(memory, "_container_bytes", lambda: 40 * GIB)
    assert FreeMemory.now().host == 30 * GIB
    assert FreeMemory.now(5 * GIB).host == 5 * GIB
    monkeypatch.setattr(memory, "_container_bytes", lambda: GIB)
    assert FreeMemory.now().host == 0


def test_limit_of_the_container(tmp_path):
    assert memory._container_bytes(tmp_path) == 1 << 62
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 50\n")
    assert memory._container_bytes(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_bytes(tmp_path) == 1 << 62


def test_what_nobody_holds_is_collected(monkeypatch):
    monkeypatch.setattr(memory, "gc", gc)

    class Loop:
        def __init__(self):
            self.me = self
            seen.append(id(self))

        def __del__(self):
            seen.clear()

    seen = []
    Loop()
    memory.free_everything()
    assert not seen
