"""Turns of a tiny model, taken on a CPU by the real programs."""

from __future__ import annotations

import copy

import pytest
import torch

from sparda_compile.bench import turns as turns_module
from sparda_compile.bench.memory import FreeMemory
from sparda_compile.bench.prompt_programs import PromptPrograms
from sparda_compile.bench.result_file import ResultFile
from sparda_compile.bench.shapes import SHAPES
from sparda_compile.bench.turns import TurnBench, TurnSetting
from sparda_compile.errors import ConfigError

ROOM = FreeMemory(1 << 40, 1 << 40)
NAMES = ("sparse_forecast", "sparse_query", "dense", "transformers_flash", "transformers_efficient")


def file_at(tmp_path):
    return ResultFile(tmp_path / "turns.json", {"name": "turns"}, "past")


@pytest.fixture
def bench(prompts):
    def make(*past, turns=(1, 20), free=ROOM, **fields):
        setting = TurnSetting(past, turns, **{"rounds": 2, "programs": NAMES, **fields})
        return TurnBench(prompts, SHAPES["tiny"], lambda: free, setting, make.said.append)

    make.said = []
    yield make
    prompts.drop()


def test_every_program_takes_every_turn(bench, tmp_path):
    file = file_at(tmp_path)
    (result,) = bench(300).measure(file)
    assert result["past"] == 300
    assert list(result["programs"]) == list(NAMES)
    assert not result["skipped"]
    for name in NAMES[:4]:
        row = result["programs"][name]
        assert list(row["by_turn"]) == ["1", "20"]
        for found in row["by_turn"].values():
            assert found["runs"] == 2
            assert 0 < found["low"] <= found["median"] <= found["high"]
            assert found["first_s"] > 0
        assert (row["host_kv_bytes"] > 0) is (name in NAMES[:3])
        assert row["gpu_kv_bytes"] > 0
    by_turn = result["programs"]["sparse_query"]["by_turn"]
    phases = [each["compared"]["phase"] for each in by_turn.values()]
    assert phases == ["decode", "sparse_prefill"]
    # torch has no such kernel for a CPU.
    for found in result["programs"]["transformers_efficient"]["by_turn"].values():
        assert list(found) == ["skipped"]
    assert result["transformers_over"]["20"]["program"] == "transformers_flash"
    assert set(result["transformers_over"]["20"]) == {"program", *NAMES[:3]}
    assert file.has(300)


def test_turns_follow_each_other_and_fit_the_cache(bench, monkeypatch, tmp_path):
    lengths = {}
    real = PromptPrograms.generate

    def generate(self, name, ids, num_new, **more):
        (cache,) = more.values()
        lengths.setdefault(name, []).append((cache.get_seq_length(), ids.shape[1], num_new))
        if name == "sparse_query":
            assert cache.kv.layout.max_tokens >= 300 + 3 * 21 + 1
        return real(self, name, ids, num_new, **more)

    monkeypatch.setattr(PromptPrograms, "generate", generate)
    bench(300, programs=("sparse_query", "transformers_flash")).measure(file_at(tmp_path))
    expected = [(300, 301, 1), (301, 302, 1), (302, 303, 1)]
    expected += [(303, 323, 1), (323, 343, 1), (343, 363, 1)]
    assert lengths == {"sparse_query": expected, "transformers_flash": expected}


def test_long_turns_are_few(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(PromptPrograms, "generate", lambda self, name, *args, **more: [15.0])
    (result,) = bench(300, programs=("transformers_flash",), rounds=5).measure(file_at(tmp_path))
    runs = {turn: row["runs"] for turn, row in result["programs"][NAMES[3]]["by_turn"].items()}
    assert runs == {"1": 2, "20": 2}


def test_what_the_file_holds_is_not_measured_again(bench, monkeypatch, tmp_path):
    file = file_at(tmp_path)
    bench(300, programs=("transformers_flash",)).measure(file)
    before = copy.deepcopy(file.get(300)["programs"])
    monkeypatch.setattr(TurnBench, "_theirs", None)
    bench(300, programs=("dense", "transformers_flash")).measure(file)
    after = file.get(300)["programs"]
    assert list(after) == ["dense", "transformers_flash"]
    assert after["transformers_flash"] == before["transformers_flash"]
    assert file.get(300)["transformers_over"]["1"]["dense"] > 0


def test_past_that_does_not_fit_is_left_out(bench, tmp_path):
    (result,) = bench(300, free=FreeMemory(1000, 1 << 40)).measure(file_at(tmp_path))
    assert not result["programs"]
    assert set(result["skipped"]) == set(NAMES)
    assert "a dynamic cache needs" in result["skipped"]["dense"]
    assert "unfinished" not in result


def test_program_without_memory_is_left_out(bench, monkeypatch, tmp_path):
    def no_room(self, name, past, turns):
        raise torch.OutOfMemoryError("no room\nfor much")

    monkeypatch.setattr(TurnBench, "_ours", no_room)
    names = ("dense", "transformers_flash")
    (result,) = bench(300, programs=names).measure(file_at(tmp_path))
    assert result["skipped"] == {"dense": "out of memory: no room"}
    assert list(result["programs"]) == ["transformers_flash"]


def test_only_turns_that_the_file_lacks_are_taken(bench, tmp_path):
    file, names = file_at(tmp_path), ("dense", "transformers_flash")
    bench(300, turns=(20,), programs=names).measure(file)
    before = copy.deepcopy(file.get(300)["programs"])
    bench(300, turns=(30, 20, 1), programs=names).measure(file)
    for name, row in file.get(300)["programs"].items():
        assert list(row["by_turn"]) == ["1", "20", "30"]
        assert row["by_turn"]["20"] == before[name]["by_turn"]["20"]
    assert list(file.get(300)["transformers_over"]) == ["1", "20", "30"]


def test_a_warm_turn_of_ours_is_profiled_when_everything_is_timed(bench, monkeypatch, tmp_path):
    log = []
    generate = PromptPrograms.generate

    def noted(self, name, ids, num_new, **more):
        log.append((name, ids.shape[1]))
        return generate(self, name, ids, num_new, **more)

    def profile(call):
        log.append("profile")
        call()
        return {"copies": {}, "hidden_share": 0.9, "gpu_busy": 0.8, "longest_idle_us": 5.0}

    monkeypatch.setattr(PromptPrograms, "generate", noted)
    monkeypatch.setattr(turns_module, "can_profile", lambda device: True)
    monkeypatch.setattr(turns_module, "profile_copies", profile)
    file, names = file_at(tmp_path), ("sparse_query", "transformers_flash")
    (result,) = bench(300, programs=names).measure(file)
    assert [name for name, _ in log[:12]] == [names[0]] * 6 + [names[1]] * 6
    ends = [301, 302, 303, "profile", 304, 324, 344, 364, "profile", 384]
    assert log[12:] == [end if end == "profile" else (names[0], end) for end in ends]
    for turn in ("1", "20"):
        ours, theirs = (result["programs"][name]["by_turn"][turn] for name in names)
        assert (ours["hidden_share"], ours["runs"]) == (0.9, 2)
        assert "copies" not in theirs
    log.clear()
    bench(300, programs=names).measure(file)
    assert not log

    def no_room(call):
        raise torch.OutOfMemoryError("no room\nfor much")

    monkeypatch.setattr(turns_module, "profile_copies", no_room)
    (result,) = bench(300, programs=("dense",)).measure(file)
    for found in result["programs"]["dense"]["by_turn"].values():
        assert found["copies_skipped"] == "out of memory: no room"
        assert found["runs"] == 2


def test_no_turn_is_profiled_without_a_gpu(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(turns_module, "profile_copies", None)
    (result,) = bench(300, programs=("dense",)).measure(file_at(tmp_path))
    assert "copies" not in result["programs"]["dense"]["by_turn"]["1"]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"past": ()}, "past="),
        ({"turns": (0,)}, "turns="),
        ({"turns": (1, 1)}, "each once"),
        ({"rounds": 0}, "rounds=0"),
    ],
)
def test_setting_is_checked(fields, what):
    with pytest.raises(ConfigError, match=what):
        TurnSetting(**fields)
