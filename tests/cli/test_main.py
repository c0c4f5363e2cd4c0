from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparda_compile.cli import main as cli
from sparda_compile.demo import run as demo

ROOT = Path(__file__).resolve().parents[2]
BLOOM = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def sparda(tmp_path, monkeypatch):
    """Run the command line in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return CliRunner().invoke(cli.app, [str(a) for a in arguments])

    return run


def write_config(folder, fields):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_version(sparda):
    result = sparda("version")
    assert result.exit_code == 0
    version = torch.__version__.split("+")[0]
    assert any(line.startswith(f"torch {version}") for line in result.stdout.splitlines())


def test_version_as_json(sparda):
    versions = json.loads(sparda("version", "--json").stdout)
    assert list(versions) == ["sparda_compile", "torch", "transformers", "python"]


def test_runs_as_a_module():
    command = [sys.executable, "-m", "sparda_compile", "version", "--json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_inspect_prints_tables_and_writes_the_report(sparda, tmp_path):
    result = sparda("inspect", "tiny-gemma3", "--trace", "traces/decode.json")
    assert result.exit_code == 0, result.stderr
    assert "1 attentions rewritten, 1 left dense" in result.stdout
    assert "Layers 0 stay dense: sliding window of 16 tokens" in result.stdout
    assert "schedule_transfers" in result.stdout
    assert "Wrote sparda-report.html" in result.stdout
    assert (tmp_path / "sparda-report.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "traces/decode.json").read_text())["traceEvents"]
    assert "tracing and rewriting Gemma3ForCausalLM" in result.stderr


def test_inspect_as_json_prints_nothing_else(sparda, tmp_path):
    result = sparda(
        "inspect", "tiny-llama", "--json", "--mode", "query", "--selector", "quest",
        "--top-k", "all", "--batch", 3, "--tokens", 1000, "--html", tmp_path / "page.html",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["mode"], report["batch_size"], report["max_tokens"]) == ("query", 3, 1024)
    assert [site["kind"] for site in report["sites"]] == ["sparse", "sparse"]
    assert (tmp_path / "page.html").exists()
    assert not (tmp_path / "sparda-report.html").exists()


def test_inspect_local_folder(sparda, tmp_path):
    folder = write_config(tmp_path / "model", LLAMA)
    result = sparda("inspect", folder, "--json")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["sites"]) == 3
    assert sorted(p.name for p in folder.iterdir()) == ["config.json"]


def test_inspect_refused_model(sparda, tmp_path):
    result = sparda("inspect", write_config(tmp_path / "model", BLOOM))
    assert result.exit_code == 1
    assert "BloomForCausalLM" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "sparda-report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "tiny-lama"], "Did you mean 'tiny-llama'"),
        (["inspect", "t5"], "no model that can be inspected"),
        (["inspect", "./nowhere"], "has no config.json"),
        (["inspect", "tiny-llama", "--mode", "exacd"], "Did you mean 'exact'"),
        (["inspect", "tiny-llama", "--machine", "a100"], "use one of cpu, h100, h200"),
        (["inspect", "tiny-llama", "--top-k", "many"], "or 'all' for every block"),
        (["inspect", "tiny-llama", "--batch", "0"], "greater than or equal to 1"),
        (["inspect", "tiny-llama", "--html", "/dev/null/page.html"], "cannot be written"),
        (["demo", "--model", "random", "--mode", "fast"], "use one of dense"),
        (["demo", "--model", "random", "--tokens", "100000000"], "bytes of text that the demo has"),
        (["demo", "--model", "large"], "use small or random"),
        (["inspect"], "Missing argument"),
    ],
)
def test_wrong_usage(sparda, arguments, words):
    result = sparda(*arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.replace("\u2502", " ").split())
    assert "Traceback" not in result.stderr


def test_unreadable_config(sparda, tmp_path):
    folder = write_config(tmp_path / "model", {"model_type": "no such type"})
    result = sparda("inspect", folder)
    assert result.exit_code == 2
    assert "transformers cannot read" in result.stderr


def test_demo_prints_a_table(sparda, tmp_path):
    result = sparda(
        "demo", "--model", "random", "--tokens", 640, "--new-tokens", 3, "--mode", "forecast"
    )
    assert result.exit_code == 0, result.stderr
    assert "original" in result.stdout
    assert result.stdout.count("Forecast weights are not trained") == 1
    assert "not trained" not in result.stderr
    assert "Wrote sparda-demo.html" in result.stdout
    assert (tmp_path / "sparda-demo.html").exists()


def test_demo_that_finds_a_difference_fails(sparda, monkeypatch):
    def generate(model, ids, new_tokens):
        return torch.full((new_tokens,), float(hasattr(model, "sparda"))), (1.0, 1.0)

    monkeypatch.setattr(demo, "_generate", generate)
    monkeypatch.setattr(demo, "_row", lambda *a: wrong_row())
    result = sparda(
        "demo", "--model", "random", "--tokens", 128, "--new-tokens", 2, "--mode", "dense", "--json"
    )
    assert result.exit_code == 1
    assert "mode dense reads all blocks, but only 0%" in result.stderr
    assert json.loads(result.stdout)["mismatches"]


def wrong_row():
    return demo.DemoRow(
        mode="dense", blocks=2, num_blocks=2, agreement=0.0, must_agree=True, prefill_ms=1.0,
        token_ms=1.0, device_bytes=1, full_bytes=1,
    )  # fmt: skip
