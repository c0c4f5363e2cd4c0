"""Prompts of a tiny model, read on a CPU by the real programs."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from sparda_compile.bench import prefill
from sparda_compile.bench.prefill import (
    DEFAULT_TOKENS,
    NUM_NEW,
    PrefillBench,
    PrefillSetting,
    best_baseline,
    seconds_of,
    with_laws,
)
from sparda_compile.bench.prompt_floor import Rates
from sparda_compile.bench.prompt_programs import PromptPrograms
from sparda_compile.bench.result_file import ResultFile
from sparda_compile.bench.shapes import SHAPES
from sparda_compile.errors import ConfigError, HostPoolFullError

RATES = Rates(0.05, 5.0)
ALL = ("sparse_forecast", "sparse_query", "dense", "transformers_flash")


def file_at(tmp_path):
    return ResultFile(tmp_path / "prefill.json", {"name": "prefill"}, "tokens")


@pytest.fixture
def bench(prompts):
    def make(*tokens, clock=lambda: 0.0, **fields):
        setting = PrefillSetting(tokens, **{"rounds": 2, **fields})
        return PrefillBench(prompts, SHAPES["tiny"], RATES, setting, said.append, clock)

    said = make.said = []
    yield make
    prompts.drop()


@pytest.fixture
def timed(monkeypatch):
    """A clock for `generate`: a first token after so many seconds, the others after 0.01 each."""
    calls = []

    def generate(self, name, ids, num_new, **more):
        calls.append((name, ids.shape[1]))
        return [timed_first.get(name, 1.0) * ids.shape[1] / 100, *([0.01] * (num_new - 1))]

    timed_first = {}
    monkeypatch.setattr(PromptPrograms, "generate", generate)
    monkeypatch.setattr(PromptPrograms, "compare", lambda self, *args, **more: {"phase": "prefill"})
    monkeypatch.setattr(PromptPrograms, "kv_bytes", lambda self, name, *, on_host: 7)
    calls_and_first = type("Timed", (), {"calls": calls, "first": timed_first})
    return calls_and_first


def test_every_program_reads_every_length(bench, tmp_path):
    results = bench(40, 200).measure(file_at(tmp_path))
    assert [result["tokens"] for result in results] == [40, 200]
    for result in results:
        assert list(result["programs"]) == list(ALL)
        assert list(result["skipped"]) == ["transformers_cudnn"]
        assert "unfinished" not in result
        for name, row in result["programs"].items():
            assert row["first_token_s"]["runs"] == 2
            assert row["first_token_s"]["low"] <= row["first_token_s"]["median"] < 60
            assert len(row["tokens_2_to_10_over_steady"]) == 9
            assert row["over_floor"] == pytest.approx(
                row["first_token_s"]["median"] / row["floor_s"]["total"], rel=0.05
            )
            is_ours = not name.startswith("transformers")
            assert ("compared" in row) is is_ours
            assert (row["host_kv_bytes"] > 0) is is_ours
        assert result["transformers"]["program"] == "transformers_flash"
        assert set(result["transformers_over"]) == set(ALL[:3])
    compared = [r["programs"]["sparse_query"]["compared"]["phase"] for r in results]
    assert compared == ["prefill", "sparse_prefill"]
    kept = json.loads((tmp_path / "prefill.json").read_text())
    assert kept["results"] == results
    assert kept["environment"]["commit"]


def test_what_the_file_holds_is_not_measured_again(bench, timed, tmp_path):
    file = file_at(tmp_path)
    bench(40, programs=("dense", "transformers_flash")).measure(file)
    before = copy.deepcopy(file.get(40)["programs"])
    timed.calls.clear()
    again = file_at(tmp_path)
    bench(40).measure(again)
    assert {name for name, _ in timed.calls} == {"sparse_forecast", "sparse_query"}
    after = again.get(40)["programs"]
    assert {name: after[name] for name in before} == before
    timed.calls.clear()
    bench(40).measure(again)
    assert not timed.calls


def test_what_was_read_in_chunks_stays_unless_others_are_asked_for(bench, timed, tmp_path):
    file = file_at(tmp_path)
    made = bench(40, programs=("dense", "transformers_flash"))
    made.measure(file)
    for chunk_tokens, expected in ((None, set()), (64, {"dense"})):
        timed.calls.clear()
        settings = {"chunk_tokens": chunk_tokens} if chunk_tokens else {}
        bench(40, programs=("dense", "transformers_flash"), settings=settings).measure(file)
        assert {name for name, _ in timed.calls} == expected
    # These programs were not told of the chunks; a lab tells them.
    assert file.get(40)["programs"]["dense"]["chunk_tokens"] is None


def test_short_prompts_take_turns_and_long_ones_do_not(bench, timed, monkeypatch, tmp_path):
    monkeypatch.setattr("sparda_compile.bench.prefill._IN_TURNS", 50)
    monkeypatch.setattr("sparda_compile.bench.prefill._ROUND_S", 1000.0)
    names = ("dense", "transformers_flash")
    bench(40, 60, programs=names).measure(file_at(tmp_path))
    # The cold call and the first warm one of each, then turns.
    both = [names[0]] * 2 + [names[1]] * 2
    assert [name for name, n in timed.calls if n == 40] == [*both, *names]
    assert [name for name, n in timed.calls if n == 60] == [names[0]] * 3 + [names[1]] * 3


def test_rounds_fall_for_long_prompts(bench, timed, tmp_path):
    timed.first["dense"] = 10.0  # 4 s of 40 tokens, 20 of 200, 50 of 500
    results = bench(40, 200, 500, programs=("dense",), rounds=5, limit_s=1e9).measure(
        file_at(tmp_path)
    )
    rounds = [r["programs"]["dense"]["first_token_s"]["runs"] for r in results]
    assert rounds == [5, 1, 1]


def test_a_call_beyond_the_limit_is_left_out_and_a_law_stands_in(bench, timed, tmp_path):
    file = file_at(tmp_path)
    found = bench(100, 200, 3000, programs=ALL, limit_s=10.0).measure(file)[-1]
    assert not found["programs"]
    assert all("more than the limit of 10" in reason for reason in found["skipped"].values())
    assert "unfinished" not in found
    # One second for each hundred tokens, and no law for what is not quadratic.
    assert set(found["by_law"]) == {"dense", "transformers_flash"}
    assert found["by_law"]["dense"]["fitted_to"] == [100, 200]
    assert found["by_law"]["dense"]["first_token_s"] == pytest.approx(30.0)
    assert found["transformers"]["by_law"] is True
    assert file.has(3000)


def test_what_there_is_no_time_for_is_measured_next_time(bench, timed, tmp_path):
    file = file_at(tmp_path)
    now = [0.0]

    def clock():
        now[0] += 10.0
        return now[0]

    # Ours take 45 s to build: two of them begin in time, and what needs no building does.
    bench(40, programs=ALL, minutes=1.1, clock=clock).measure(file)
    found = file.get(40)
    assert list(found["programs"]) == ["sparse_forecast", "sparse_query", "transformers_flash"]
    assert found["skipped"] == {"dense": "it takes about 0.8 minutes, and 0.6 are left"}
    assert found["unfinished"]
    assert not file.has(40)
    bench(40, programs=ALL).measure(file)
    assert list(file.get(40)["programs"]) == list(ALL)
    assert file.get(40)["skipped"] == {}
    assert file.has(40)


def test_what_is_left_out_for_time_stays_so_when_others_are_measured(bench, timed, tmp_path):
    file = file_at(tmp_path)
    bench(40, programs=("dense",), minutes=0).measure(file)
    bench(40, programs=("sparse_query",)).measure(file)
    assert list(file.get(40)["programs"]) == ["sparse_query"]
    assert list(file.get(40)["skipped"]) == ["dense"]
    assert not file.has(40)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, HostPoolFullError])
def test_program_without_memory_is_left_out(bench, timed, monkeypatch, tmp_path, error):
    def no_room(self, name, *args, **more):
        if name == "sparse_query":
            raise error("no room\nfor much")
        return {"phase": "prefill"}

    monkeypatch.setattr(PromptPrograms, "compare", no_room)
    (found,) = bench(40, programs=ALL).measure(file_at(tmp_path))
    assert found["skipped"] == {"sparse_query": "out of memory: no room"}
    assert list(found["programs"]) == ["sparse_forecast", "dense", "transformers_flash"]
    assert "40 tokens: sparse_query is left out: out of memory: no room" in bench.said


def test_expectation_goes_by_the_same_program_at_a_length_that_is_near(bench):
    made = bench(40)

    def known(tokens, over):
        return {"tokens": tokens, "programs": {"dense": {"over_floor": over}}}

    floor = made._floor("dense", 64000)["total"]
    assert made._expected("dense", 64000, []) == 2 * floor
    assert made._expected("dense", 64000, [known(100, 9.0)]) == 2 * floor
    assert made._expected("dense", 64000, [known(2000, 3.0), known(4000, 1.5)]) == 1.5 * floor
    assert made._expected("sparse_query", 64000, [known(4000, 1.5)]) == (
        2 * made._floor("sparse_query", 64000)["total"]
    )


def row(seconds):
    return {"first_token_s": {"median": seconds}}


def test_laws_are_made_again_of_all_results():
    short = {"tokens": 1000, "programs": {"transformers_flash": row(1.0)}, "skipped": {}}
    middle = {
        "tokens": 2000,
        "programs": {"transformers_flash": row(4.0), "sparse_query": row(2.0)},
        "skipped": {"transformers_cudnn": "torch has none"},
    }
    long = {
        "tokens": 4000,
        "programs": {"sparse_query": row(4.0)},
        "skipped": {"transformers_flash": "too long", "transformers_cudnn": "torch has none"},
    }
    found = with_laws([short, middle, long])
    assert found[1]["transformers_over"] == {"sparse_query": 2.0}
    assert found[2]["by_law"]["transformers_flash"]["first_token_s"] == 16.0
    assert found[2]["transformers"] == {
        "program": "transformers_flash", "first_token_s": 16.0, "by_law": True,
    }  # fmt: skip
    assert found[2]["transformers_over"] == {"sparse_query": 4.0}
    assert with_laws(found) == found
    assert "transformers" not in with_laws([long])[0]
    assert best_baseline(long) is None
    assert seconds_of(long, "transformers_flash") == (None, False)


@pytest.mark.parametrize(
    ("fields", "what"),
    [({"tokens": ()}, "2 or more"), ({"tokens": (1,)}, "2 or more"), ({"rounds": 0}, "rounds=0")],
)
def test_setting_is_checked(fields, what):
    with pytest.raises(ConfigError, match=what):
        PrefillSetting(**fields)


def test_first_length_is_the_shortest_that_a_user_waits_for():
    assert DEFAULT_TOKENS[:2] == (1024, 131072)
    assert set(DEFAULT_TOKENS) == {1024, 4096, 32768, 131072, 524288, 1048576}
    assert NUM_NEW == 30


@pytest.mark.gpu
def test_prompts_and_turns_on_a_gpu(tmp_path):
    from sparda_compile.bench.lab import Lab
    from sparda_compile.bench.turns import TurnSetting

    lab = Lab("tiny", lambda text: None)
    (short, long) = lab.prefill(PrefillSetting((200, 7000), rounds=2), file_at(tmp_path))
    for result in (short, long):
        assert set(ALL) <= set(result["programs"])
        assert not set(result["skipped"]) - {"transformers_cudnn"}
        for row in result["programs"].values():
            assert 0 < row["peak_gpu_bytes_beyond_weights"] < row["peak_gpu_bytes"]
    compared = {name: long["programs"][name]["compared"]["phase"] for name in ALL[:3]}
    assert compared == dict(zip(ALL, ("sparse_prefill", "sparse_prefill", "prefill"), strict=False))
    file = ResultFile(tmp_path / "turns.json", {"name": "turns"}, "past")
    (result,) = lab.turns(TurnSetting((7000,), rounds=2), file)
    assert not result["skipped"]
    assert set(result["transformers_over"]) == {"1", "200", "4000"}


@pytest.fixture
def profiled(monkeypatch):
    """A device that can be profiled, and what was run since: names of `generate` and a profile."""
    log = []
    generate = PromptPrograms.generate

    def noted(self, name, ids, num_new, **more):
        log.append((name, ids.shape[1], num_new))
        return generate(self, name, ids, num_new, **more)

    def profile(call):
        log.append("profile")
        call()
        return {"copies": {}, "hidden_share": 0.9, "gpu_busy": 0.8, "longest_idle_us": 5.0}

    monkeypatch.setattr(PromptPrograms, "generate", noted)
    monkeypatch.setattr(prefill, "can_profile", lambda device: True)
    monkeypatch.setattr(prefill, "profile_copies", profile)
    return log


def test_ours_are_profiled_when_everything_is_timed(bench, profiled, tmp_path):
    names = ("sparse_query", "transformers_flash")
    file = file_at(tmp_path)
    results = bench(40, 200, programs=names).measure(file)
    first = profiled.index("profile")
    timed = [name for name, *_ in profiled[: first - 1]]
    assert timed.count("transformers_flash") == timed.count("sparse_query") == 2 * 3
    # Each is made anew, called once, and called under the profiler.
    call = [("sparse_query", 40, NUM_NEW), ("sparse_query", 200, NUM_NEW)]
    assert profiled[first - 1 :] == [call[0], "profile", call[0], call[1], "profile", call[1]]
    for result in results:
        ours, theirs = (result["programs"][name] for name in names)
        assert (ours["hidden_share"], ours["gpu_busy"], ours["copies"]) == (0.9, 0.8, {})
        assert "hidden_share" not in theirs
    profiled.clear()
    bench(40, 200, programs=names).measure(file)
    assert not profiled


def test_nothing_is_profiled_without_a_gpu_or_where_it_is_not_wanted(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(prefill, "profile_copies", None)
    (result,) = bench(40, programs=("dense",)).measure(file_at(tmp_path))
    assert "copies" not in result["programs"]["dense"]
    monkeypatch.setattr(prefill, "can_profile", lambda device: True)
    bench(60, programs=("dense",), profile=False).measure(file_at(tmp_path))


def test_what_was_not_profiled_says_why_and_is_asked_again(bench, profiled, monkeypatch, tmp_path):
    file, names = file_at(tmp_path), ("dense",)

    def no_room(call):
        raise torch.OutOfMemoryError("no room\nfor much")

    with monkeypatch.context() as patch:
        patch.setattr(prefill, "profile_copies", no_room)
        (result,) = bench(40, programs=names).measure(file)
    row = result["programs"]["dense"]
    assert row["copies_skipped"] == "out of memory: no room"
    assert "copies" not in row
    (result,) = bench(40, programs=names, minutes=0).measure(file)
    assert "are left" in result["programs"]["dense"]["copies_skipped"]
    (result,) = bench(40, programs=names).measure(file)
    assert result["programs"]["dense"]["hidden_share"] == 0.9
    assert "copies_skipped" not in result["programs"]["dense"]
