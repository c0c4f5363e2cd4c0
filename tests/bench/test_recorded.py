from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch

from sparda_compile.bench.decode import DecodeBench
from sparda_compile.bench.memory import layout_of
from sparda_compile.bench.recorded import RecordedSteps, choose_cases, follow_recorded
from sparda_compile.bench.shapes import SHAPES
from sparda_compile.errors import ConfigError
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.state.layout import state_name
from sparda_compile.traces import Recording, TraceFile

TOKENS = 1920
SETTINGS = {"top_k": 4, "local_blocks": 2}
STEPS = 12
FREE = 9


def recording(seed=0, chosen=2, steps=STEPS, share=0.1, selector="infllm2"):
    """Return three layers and KV heads that keep one block of two from step to step, at random."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack(
        [torch.randperm(FREE, generator=generator)[:chosen] for _ in range(3 * steps * 3)]
    )
    ids = 1 + ids.view(3, steps, 3, chosen).sort(-1).values
    return Recording("t", "0" * 64, selector, share, 600, 1, FREE, ids.to(torch.uint8))


def cache(batch=2, room=16, **settings):
    sizes = SETTINGS | settings
    return KVCache(
        layout_of(SHAPES["tiny"], "scheduled", batch, 2048, room, **sizes), torch.device("cpu")
    )


def named(kv, layer, step):
    """Return the ids that a trace names in a step, by sequence and KV head."""
    trace = kv.state[state_name("trace", layer)]
    rows = trace[:, :, (TOKENS + step) % trace.shape[2]]
    return [[torch.where(head)[0].tolist() for head in row] for row in rows]


def test_each_copy_reads_what_was_recorded_at_its_place():
    kv, steps = cache(), RecordedSteps("a", (recording(0), recording(1)), 2)
    found = follow_recorded(kv, TOKENS, steps, STEPS)
    apart = 27 // 2
    for layer, source in ((0, 0), (1, 1)):
        kept = []
        for step in range(STEPS):
            rows = named(kv, layer, step)
            for row, text in enumerate(steps.recordings):
                for head in range(2):
                    ids = text.ids_LSGK[source, step, head].tolist()
                    assert rows[row][head] == sorted(i + apart * c for i in ids for c in (0, 1))
            kept.append(rows)
        shared = [
            len({*a} & {*b}) / 4
            for before, after in pairwise(kept)
            for one, other in zip(before, after, strict=True)
            for a, b in zip(one, other, strict=True)
        ]
        assert found[layer] == pytest.approx(sum(shared) / len(shared))
    assert 0.0 < found[0] < 1.0


def test_overlap_by_layer_is_that_of_the_recording():
    one = recording(3)
    text = dataclasses.replace(one, ids_LSGK=one.ids_LSGK[:2, :, :2])
    steps = RecordedSteps("a", (text,), 2)
    found = follow_recorded(cache(batch=1), TOKENS, steps, STEPS)
    assert found == pytest.approx(text.overlap_by_layer())
    assert steps.overlap() == pytest.approx(sum(found) / 2)


def test_sequences_of_one_text_begin_at_other_steps():
    kv = cache(batch=3)
    text = recording(4)
    follow_recorded(kv, TOKENS, RecordedSteps("a", (text,), 2), 4)
    for row, begin in ((0, 0), (1, 4), (2, 8)):
        ids = text.ids_LSGK[0, begin, 0].tolist()
        assert named(kv, 0, 0)[row][0][:2] == ids


@pytest.mark.parametrize(
    ("copies", "chosen", "needed", "words"),
    [
        (4, 1, 4, "4 copies of 9 blocks do not fit the 27 .*; use 3 or fewer"),
        (2, 2, 13, "the trace has 12 steps, fewer than the 13 that are run"),
    ],
)
def test_what_cannot_be_followed(copies, chosen, needed, words):
    steps = RecordedSteps("a", (recording(chosen=chosen),), copies)
    with pytest.raises(ConfigError, match=words):
        follow_recorded(cache(), TOKENS, steps, needed)


def test_cases_by_name_and_by_the_number_of_blocks():
    file = TraceFile({}, 64, (recording(), recording(1), recording(2, chosen=3, share=0.25)))
    (few,) = choose_cases(file, ["infllm2 10%"], None, 62)
    assert (few.copies, few.scored, len(few.recordings)) == (31, 62, 2)
    assert [each.scored for each in choose_cases(file, [], None, 6)] == [6, 6]
    assert choose_cases(file, ["infllm2 25%"], 5, 62)[0].scored == 15
    with pytest.raises(ConfigError, match="not in the trace; use some of infllm2 10%, infllm2 25%"):
        choose_cases(file, ["infllm2 50%"], None, 62)
    with pytest.raises(ConfigError, match="infllm2 10%: 10, infllm2 25%: 15"):
        choose_cases(file, [], 5, 62)
    assert few.plain()["recorded_scored"] == 2
    assert len(few.plain()["texts"]) == 2


def test_a_benchmark_follows_it_beside_overlaps(lab, setting, roomy):
    recorded = RecordedSteps("infllm2 10%", (recording(),), 2)
    setting = dataclasses.replace(
        setting, variants=("scheduled", "resident"), overlaps=(1.0,), recorded=(recorded,)
    )
    told = []
    bench = DecodeBench(lab.captures, setting, told.append)
    bench.check()
    *_, result = bench.measure()
    first, last = result["by_overlap"].items()
    assert first[0] == "1.0"
    about = last[1]["recorded"]
    assert about["case"] == "infllm2 10%"
    layers = about["overlap_by_layer"]
    assert float(last[0]) == pytest.approx(sum(layers) / 2, abs=1e-3)
    assert last[1]["scheduled"]["h2d_bytes"] > first[1]["scheduled"]["h2d_bytes"]
    assert "batch 2: infllm2 10%, as recorded" in told
    # Of what the recorded steps copy, the overlap of random steps that would copy as much.
    layout = bench.caches["scheduled"].layout
    scored, block_bytes = 4, 2 * 64 * 16 * 2
    every = len(layout.layers) * 2 * 2 * scored * block_bytes
    moved = last[1]["scheduled"]["h2d_bytes"] / every
    assert layout.fresh_share(about["overlap_by_bytes"]) == pytest.approx(moved, abs=1e-3)
