"""`--tp N` of benchmarks: the ranks that it starts, and what they write."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from sparda_compile import environment
from sparda_compile.cli import main as cli
from sparda_compile.cli.bench_files import decode_file

needs_few_gpus = pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two GPUs")
TINY = ["--shape", "tiny", "--tokens", "10240", "--rounds", "1", "--steps", "1"]
ONE = ["--variant", "scheduled", "--overlap", "0.9"]


def run(*arguments, what="decode"):
    return CliRunner().invoke(cli.app, ["bench", what, *map(str, arguments)])


@needs_few_gpus
def test_two_ranks_are_measured_on_cpus(tmp_path):
    out = run("--tp", 2, *TINY, *ONE, "--out", tmp_path, "--json")
    assert out.exit_code == 0, out.output
    found = json.loads(out.stdout.splitlines()[-1])
    written = json.loads((tmp_path / "decode-tiny-tp2.json").read_text())
    assert found["results"] == written["results"]
    assert (written["name"], written["tp"]) == ("decode-tp", 2)
    (result,) = written["results"]
    assert result["by_overlap"]["0.9"]["tokens_per_s"] > 0
    assert len(result["ranks"]) == 2
    halves = [rank["h2d_bytes"]["0.9"] for rank in result["ranks"]]
    assert halves[0] == halves[1] > 0


@needs_few_gpus
def test_more_ranks_than_gpus_are_refused_in_a_sentence(tmp_path):
    out = run("--tp", 2, "--shape", "8b", "--out", tmp_path)
    assert out.exit_code == 2
    assert "--tp 2 measures 2 CUDA GPUs" in " ".join(out.output.split())


@pytest.fixture
def started(monkeypatch):
    """What was started, which writes nothing."""
    seen = {}

    def start(command, env, **_):
        seen.update(command=command, env=env)
        return SimpleNamespace(returncode=seen.get("returns", 0))

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setattr(environment, "_commit", lambda: "abc123")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    return seen


def test_ranks_get_the_same_options_and_no_multicast(tmp_path, started):
    started["returns"] = 3
    out = run("--tp", 4, *TINY, *ONE, "--batch", 1, "--batch", 16, "--out", tmp_path)
    assert out.exit_code == 1
    assert "a rank of --tp 4 ended with an error" in out.output
    command = started["command"]
    begin = command.index("sparda_compile")
    assert command[begin - 2 : begin] == ["--nproc-per-node=4", "-m"]
    assert command[begin + 1 : begin + 3] == ["bench", "decode"]
    options = " ".join(command[begin + 3 :])
    assert options == (
        "--shape tiny --batch 1 --batch 16 --tokens 10240 --overlap 0.9 --variant scheduled "
        f"--rounds 1 --steps 1 --out {tmp_path} --tp 4"
    )
    assert started["env"]["NCCL_NVLS_ENABLE"] == "0"
    assert started["env"]["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"


@pytest.mark.parametrize(
    ("what", "own"),
    [("prefill", ("--tokens", 100, "--minutes", 2.0)), ("turns", ("--past", 300, "--tokens", 7))],
)
def test_prompts_of_ranks_get_the_same_options(tmp_path, started, what, own):
    (tmp_path / f"{what}-tiny-tp2.json").write_text("{}")
    more = ("--no-baseline", "--program", "dense", "--max-host-gib", 3.0, "--out", tmp_path)
    out = run("--shape", "tiny", *own, *more, "--tp", 2, "--json", what=what)
    assert out.exit_code == 0, out.output
    found = json.loads(out.stdout)
    assert (found["name"], found["tp"], found["results"]) == (f"{what}-tp", 2, [])
    command = started["command"]
    assert command[command.index("bench") + 1] == what
    options = command[command.index("bench") + 2 :]
    asked = (*own, *more, "--shape", "tiny", "--tp", 2)
    assert sorted(options) == sorted(map(str, asked)), "and neither --json nor a default"


@pytest.mark.parametrize("what", ["prefill", "turns"])
def test_one_of_the_ranks_measures_prompts(tmp_path, monkeypatch, what):
    from sparda_compile.bench import rank_prompts

    asked = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(rank_prompts, "measure_prompts_on_ranks", lambda *args: asked.append(args))
    options = ("--tp", 2, "--shape", "tiny", "--rounds", 1, "--max-host-gib", 1, "--out", tmp_path)
    assert run(*options, what=what).exit_code == 0
    ((shape, setting, tp, _, file, limit),) = asked
    assert (shape, tp, setting.rounds, limit) == ("tiny", 2, 1, 1 << 30)
    assert file.path == tmp_path / f"{what}-tiny-tp2.json"
    assert not file.path.exists()


def test_one_of_the_ranks_measures_and_does_not_start_others(tmp_path, monkeypatch):
    from sparda_compile.bench import rank_decode

    asked = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(rank_decode, "measure_on_ranks", lambda *args: asked.append(args))
    assert run("--tp", 2, *TINY, *ONE, "--out", tmp_path).exit_code == 0
    ((shape, settings, tp, *_),) = asked
    assert (shape, tp, settings[0].steps) == ("tiny", 2, 1)


@pytest.mark.parametrize(("kv_format", "name"), [("model", "8b-tp8"), ("int8", "8b-int8-tp8")])
def test_file_of_a_number_of_ranks(tmp_path, kv_format, name):
    file = decode_file(tmp_path, "8b", 4096, None, {"kv_format": kv_format}, 8)
    assert file.path.name == f"decode-{name}.json"
    assert (file.head["name"], file.head["tp"]) == ("decode-tp", 8)
