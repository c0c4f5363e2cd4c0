"""`sparda bench profile`: what it refuses, and what it writes. Measuring itself needs a GPU."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from sparda_compile.cli import labs, profile
from sparda_compile.profiling.measured import measure


@pytest.fixture
def run(monkeypatch, decode_trace, tmp_path):
    """Return a function that runs the command; what was recorded takes the place of a GPU."""
    app = typer.Typer()
    app.command()(profile.bench_profile)
    asked = []

    def recorded(*args):
        asked.append(args[:5])
        args[5].write_text("{}")
        return measure(decode_trace.events, decode_trace.schedule, decode_trace.nodes, "H200")

    def invoke(*args, has_gpu=True):
        if has_gpu:
            monkeypatch.setattr(labs, "require_gpu", lambda command: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(profile, "_measure", recorded)
        result = CliRunner().invoke(app, ["--out", str(tmp_path / "new"), *args])
        result.asked = asked
        return result

    return invoke


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (("--shape", "9b"), "'9b' is not one of '8b', '8b-8kv', 'tiny'"),
        (("--tokens", "131000"), "use a multiple of 64 from"),
        (("--tokens", "8192"), "use a multiple of 64 from"),
        (("--mode", "dense"), "'dense' is not one of 'query', 'forecast', 'exact', 'speculate'"),
        (("--mode", "all"), "'all' is not one of 'query'"),
        (("--overlap", "2"), "--overlap"),
    ],
)
def test_wrong_options_are_refused(run, args, what):
    result = run(*args)
    assert result.exit_code == 2
    assert what in " ".join(result.stderr.replace("\u2502", " ").split())
    assert result.asked == []


def test_no_gpu_is_wrong_usage(run, tmp_path):
    result = run(has_gpu=False)
    assert result.exit_code == 2
    assert "sparda bench profile" in result.stderr
    assert "torch" in result.stderr
    assert not (tmp_path / "new").exists()


def test_files_and_table(run, tmp_path):
    options = ("--tokens", "65536", "--overlap", "0.7", "--mode", "exact", "--commit", "abc")
    result = run("--batch", "2", *options)
    assert result.exit_code == 0, result.output
    assert result.asked == [("8b", 2, 65536, 0.7, "exact")]
    names = ("profile.json", "profile.html", "trace.json")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)
    for name in names:
        assert f"{name}" in result.stdout
    assert "select_pages" in result.stdout
    assert "scores_3" not in result.stdout
    plain = json.loads((tmp_path / "new" / "profile.json").read_text())
    assert (plain["mode"], plain["overlap"], plain["batch_size"]) == ("exact", 0.7, 2)
    assert plain["measured"]["step_us"] == pytest.approx(850.6, abs=0.1)
    assert "torch" in plain["environment"]
    assert plain["environment"]["commit"] == "abc"


def test_nodes_and_json(run):
    assert "scores_3" in run("--nodes").stdout
    plain = json.loads(run("--json").stdout)
    assert plain["nodes"][0]["node"] == "scores_0"


def test_least_tokens_hold_a_trace():
    """What is allowed is enough for `follow`: two steps of scored blocks beside the others."""
    from sparda_compile.config import SpardaConfig
    from sparda_compile.errors import ConfigError

    config = SpardaConfig()
    with pytest.raises(ConfigError) as caught:
        profile._check(64, "forecast")
    least = int(str(caught.value).split(" from ")[1].split(" on")[0])
    profile._check(least, "forecast")
    end = (least - 128) // config.block_size - config.local_blocks
    assert end - config.sink_blocks >= 2 * config.top_k


@pytest.fixture(scope="module")
def tiny():
    """Return the tiny shape on the CPU, traced."""
    from sparda_compile.bench.lab import Lab

    return Lab("tiny", lambda text: None, device="cpu").captures


@pytest.mark.parametrize("overlap", [0.5, 1.0])
def test_speculation_predicts_as_much_of_a_trace_as_its_steps_have_in_common(tiny, overlap):
    from sparda_compile.bench.programs import build_program
    from sparda_compile.bench.synthetic import fill, follow, rewind
    from sparda_compile.runtime.kv_cache import KVCache

    settings = profile._settings("speculate", overlap)
    small = {"top_k": 6, "local_blocks": 1, "lowering": "eager", "machine": "h200"}
    program = build_program(
        tiny, "scheduled", 1, 2048, 24, **settings, **small, speculation_budget=1.0
    )
    assert {part.stream for part in program.plan.schedule.speculation} == {"attend", "compute"}
    start = 2048 - 128
    cache = KVCache(program.plan.layout, torch.device("cpu"))
    fill(cache, start)
    follow(cache, start, overlap)
    rewind(cache, start)
    ids = torch.zeros((1, 1), dtype=torch.long)
    for step in range(12):
        program(ids, torch.full_like(ids, start + step), None, cache)
        if step == 2:
            cache.reset_stats()
    for layer in cache.stats().layers.values():
        # Of 9 blocks the current one is never predicted, and of 6 scored ones those of the trace.
        assert layer.coverage == pytest.approx((2 + 6 * overlap) / 9, abs=0.1)
