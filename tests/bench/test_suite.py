from __future__ import annotations

from sparda_compile.bench.shapes import SHAPES
from sparda_compile.bench.suite import PARTS, WITH_BASELINES, Part, run_parts


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(minutes, *parts):
    """Run parts (name, minutes, kept, error); each takes as long as it says."""
    clock, told, saved = Clock(), [], []

    def part(name, minutes, is_done=False, error=None):
        def work():
            clock.now += 60 * minutes
            if error is not None:
                raise error

        return Part(name, minutes, lambda: is_done, work)

    found = run_parts(
        [part(*p) for p in parts], minutes, told.append, lambda p: saved.append(list(p)), clock
    )
    return found, told, saved


def test_parts_that_do_not_end_in_time_are_left_out():
    found, told, saved = run(10, ("a", 6), ("b", 5), ("c", 4))
    assert [(part["name"], part["status"]) for part in found] == [
        ("a", "done"), ("b", "left out"), ("c", "done"),
    ]  # fmt: skip
    assert found[0]["seconds"] == 360.0
    assert found[1]["reason"] == "it takes about 5 minutes, and 4.0 are left"
    assert "b is left out: it takes about 5 minutes, and 4.0 are left" in told
    assert [len(parts) for parts in saved] == [1, 2, 3]


def test_results_that_are_there_are_kept():
    found, _, _ = run(1, ("a", 6, True), ("b", 1))
    assert [part["status"] for part in found] == ["kept", "done"]


def test_failed_part_is_reported_and_the_others_run():
    found, told, _ = run(10, ("a", 1, False, RuntimeError("no luck")), ("b", 1))
    assert [part["status"] for part in found] == ["failed", "done"]
    assert found[0]["reason"] == "RuntimeError: no luck"
    assert any("Traceback" in text for text in told)
    assert "a failed: RuntimeError: no luck" in told


def test_parts_are_of_shapes_that_are_there():
    assert {shape for _, shape, *_ in PARTS} <= set(SHAPES)
    assert {what for what, *_ in PARTS} == {"decode", "prefill", "turns"}
    assert PARTS[0][:3] == ("decode", *WITH_BASELINES)
    assert len({part[:3] for part in PARTS}) == len(PARTS)


def test_each_model_is_made_once():
    shapes = [shape for _, shape, *_ in PARTS]
    assert shapes == sorted(shapes)
