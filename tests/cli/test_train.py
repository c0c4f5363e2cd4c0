from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from sparda_compile.cli.main import app
from sparda_compile.forecast.weights import load_forecast
from sparda_compile.training import trainer
from sparda_compile.training.checkpoint import checkpoint_path

SIZES = [
    "--length", "100", "--accumulate", "2", "--top-k", "2", "--block-size", "16",
    "--local-blocks", "1", "--pool-size", "8", "--pool-stride", "4", "--lr", "0.003",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {n} says {n * n % 97}.\n" for n in range(60)))
    return path


@pytest.fixture(scope="module")
def captures():
    """Models that were traced, by class."""
    return {}


@pytest.fixture(autouse=True)
def shared_capture(captures, monkeypatch):
    """Trace a tiny model once for all tests: it is the same each time."""
    captures_of = trainer.captures_of

    def once(model):
        name = type(model).__name__
        if name not in captures:
            captures[name] = captures_of(model)
        return captures[name]

    monkeypatch.setattr(trainer, "captures_of", once)


def run(*arguments):
    return CliRunner().invoke(app, ["train", "tiny-plain", *map(str, arguments)])


def test_it_writes_weights_and_says_what_was_reached(text, tmp_path):
    out = tmp_path / "deep" / "forecast.safetensors"
    result = run("--text", text, "--out", out, "--steps", 3, "--rank", 6, *SIZES)
    assert result.exit_code == 0, result.output
    assert "loss 0." in result.stdout
    assert f"Wrote {out}" in result.stdout
    weights = load_forecast(out)
    assert (weights.info.steps, weights.info.num_tokens, weights.info.block_size) == (3, 100, 16)
    assert set(weights.info.ranks) == {6}
    assert checkpoint_path(out).is_file()


def test_json_and_resumption(text, tmp_path):
    out = tmp_path / "forecast.safetensors"
    assert run("--text", text, "--out", out, "--steps", 1, *SIZES).exit_code == 0
    first = load_forecast(out)
    more = ["--resume", checkpoint_path(out), "--steps", 3, "--json"]
    result = run("--text", text, "--out", out, *more, *SIZES)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["out"] == str(out)
    assert said["forecast"]["steps"] == 3
    assert [step["step"] for step in said["steps"]] == [2, 3]
    assert all(step["loss"] > 0 and 0 <= step["recall"] <= 1 for step in said["steps"])
    assert not torch.equal(load_forecast(out)[0], first[0])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "missing or given twice; pass --text or --dataset"),
        (["--text", "no.txt", "--dataset", "no"], 2, "given twice"),
        (["--text", "no.txt"], 2, "no.txt"),
        (["--dataset", "nowhere"], 2, "dataset='nowhere' is no folder"),
        (["--tokenizer", "nowhere", "--text", "no.txt"], 2, "tokenizer='nowhere'"),
        (["--block-size", "17", "--text", "no.txt"], 2, "block_size=17 is not allowed"),
        (["--steps", "0"], 2, "--steps"),
    ],
)
def test_wrong_usage(arguments, code, words, tmp_path):
    result = run("--out", tmp_path / "forecast.safetensors", *arguments)
    assert result.exit_code == code
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_text_too_short_for_the_length_and_length_for_the_blocks(text, tmp_path):
    out = ["--out", tmp_path / "forecast.safetensors"]
    result = run("--text", text, *out)
    assert (result.exit_code, "sequences of 65536 tokens" in result.output) == (2, True)
    result = run("--text", text, "--length", 200, "--steps", 1, *out)
    assert (result.exit_code, "pass 2177 or more" in result.output) == (1, True)


def test_output_that_cannot_be_written_is_found_at_once(text, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("--text", text, "--out", tmp_path / "file" / "forecast.safetensors")
    assert result.exit_code == 2
    assert "cannot be written" in result.output


def test_model_that_is_none(text, tmp_path):
    result = CliRunner().invoke(
        app, ["train", "llama", "--text", str(text), "--tokenizer", "bytes", "--length", "100",
              "--out", str(tmp_path / "forecast.safetensors")]
    )  # fmt: skip
    assert result.exit_code == 2
    assert "'llama' is no folder" in result.output
