"""`sparda bench decode --tp N`: the ranks that it starts, and what they write."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from sparda_compile.cli import main as cli
from sparda_compile.cli.bench_files import decode_file

needs_few_gpus = pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two GPUs")
TINY = ["--shape", "tiny", "--tokens", "10240", "--rounds", "1", "--steps", "1"]
ONE = ["--variant", "scheduled", "--overlap", "0.9"]


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", "decode", *map(str, arguments)])


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


def test_ranks_get_the_same_options_and_no_multicast(tmp_path, monkeypatch):
    seen = {}

    def start(command, env, **_):
        seen.update(command=command, env=env)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    out = run("--tp", 4, *TINY, *ONE, "--batch", 1, "--batch", 16, "--out", tmp_path)
    assert out.exit_code == 1
    assert "a rank of --tp 4 ended with an error" in out.output
    command = seen["command"]
    begin = command.index("sparda_compile")
    assert command[begin - 2 : begin] == ["--nproc-per-node=4", "-m"]
    options = command[begin + 3 :]
    assert options[:4] == ["--shape", "tiny", "--tp", "4"]
    assert options[4:8] == ["--batch", "1", "--batch", "16"]
    assert options[-2:] == ["--out", str(tmp_path)]
    assert seen["env"]["NCCL_NVLS_ENABLE"] == "0"
    assert seen["env"]["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"


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
    file = decode_file(tmp_path, "8b", 4096, None, kv_format, 8)
    assert file.path.name == f"decode-{name}.json"
    assert (file.head["name"], file.head["tp"]) == ("decode-tp", 8)
