from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from typer.testing import CliRunner

from sparda_compile.cli import train_lines
from sparda_compile.cli.main import app
from sparda_compile.forecast.weights import load_forecast
from sparda_compile.training import trainer
from sparda_compile.training.checkpoint import Checkpoint, checkpoint_path

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


def test_several_heads_are_trained_on_low_bit_keys_alone(text, tmp_path):
    out = tmp_path / "forecast.safetensors"
    given = ("--text", text, "--out", out, "--steps", 1, "--forecast-heads", 2, *SIZES)
    result = run(*given, "--selector", "lowbit2")
    assert result.exit_code == 0, result.output
    assert load_forecast(out).info.heads == 2
    result = run(*given, "--selector", "infllm2")
    assert result.exit_code == 2
    assert "--forecast-heads 2 cannot be trained for --selector infllm2" in result.output


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
    assert (said["processes"], said["tp"]) == (1, 1)
    warm = said["steps"][-1]
    assert said["tokens_per_s"] == warm["tokens_per_s"] == warm["num_tokens"] / warm["seconds"]
    assert [step["step"] for step in said["steps"]] == [2, 3]
    assert all(step["loss"] > 0 and 0 <= step["recall"] <= 1 for step in said["steps"])
    assert not torch.equal(load_forecast(out)[0], first[0])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "missing or given twice; pass --document, --text or --dataset"),
        (["--text", "no.txt", "--dataset", "no"], 2, "given twice"),
        (["--text", "no.txt"], 2, "--text no.txt cannot be read"),
        (["--dataset", "nowhere"], 2, "--dataset nowhere is no folder"),
        (["--tokenizer", "nowhere", "--text", "no.txt"], 2, "--tokenizer nowhere"),
        (["--block-size", "17", "--text", "no.txt"], 2, "--block-size 17 is not allowed"),
        (["--steps", "0"], 2, "--steps"),
        (["--document", "no.txt", "--text", "no.txt"], 2, "given twice"),
        (["--document", "no.txt"], 2, "no.txt is neither a file nor a folder"),
        (["--document", "no.txt", "--tokenizer", "no"], 2, "'no' has no tokenizer"),
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
    assert (result.exit_code, "use 2177 or more" in result.output) == (2, True)


def test_output_that_cannot_be_written_is_found_at_once(text, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("--text", text, "--out", tmp_path / "file" / "forecast.safetensors")
    assert result.exit_code == 2
    assert "cannot be written" in result.output


def test_model_that_is_none(text, tmp_path):
    sizes = ["--length", "100", "--block-size", "16", "--local-blocks", "1"]
    out = ["--out", str(tmp_path / "forecast.safetensors")]
    arguments = ["train", "llama", "--text", str(text), "--tokenizer", "bytes", *sizes, *out]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "'llama' is no folder" in result.output


def test_lines_say_what_is_done_where_there_is_no_terminal(text, tmp_path, monkeypatch):
    monkeypatch.setattr(train_lines, "_LINE_EVERY_S", 0.0)
    result = run("--text", text, "--out", tmp_path / "f.safetensors", "--steps", 2, *SIZES)
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert "loading tiny-plain ..." in lines
    assert "step 1 of 2, batch 1 of 2 ..." in lines
    assert any(re.match(r"step 1 of 2: loss \d.*, about \d+ s left", line) for line in lines)
    assert any(re.match(r"step 2 of 2: loss \d", line) for line in lines)


def test_an_interrupt_saves_and_names_the_command_that_resumes(text, tmp_path, monkeypatch):
    out = tmp_path / "the forecast.safetensors"
    arguments = ["--text", text, "--out", out, "--steps", 4, *SIZES]
    step = trainer.ForecastTrainer.step

    def interrupted(self, batches, *rest):
        if self.steps_done == 2:
            raise KeyboardInterrupt
        return step(self, batches, *rest)

    monkeypatch.setattr(trainer.ForecastTrainer, "step", interrupted)
    result = run(*arguments)
    assert result.exit_code == 130, result.output
    assert Checkpoint.load(checkpoint_path(out)).step == 2
    assert not out.exists()
    command = shlex.split(result.stderr.split("go on with: ")[1])
    assert command[:3] == ["sparda", "train", "tiny-plain"]
    assert command[-2:] == ["--resume", str(checkpoint_path(out))]
    monkeypatch.undo()
    resumed = CliRunner().invoke(app, command[1:])
    assert resumed.exit_code == 0, resumed.output
    whole = tmp_path / "whole.safetensors"
    assert run("--text", text, "--out", whole, "--steps", 4, *SIZES).exit_code == 0
    assert torch.equal(load_forecast(out)[0], load_forecast(whole)[0])


def test_an_interrupt_before_the_first_step_says_that_nothing_was_done(text, tmp_path, monkeypatch):
    def interrupted(self, batches, *rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.ForecastTrainer, "step", interrupted)
    out = tmp_path / "f.safetensors"
    result = run("--text", text, "--out", out, "--steps", 4, *SIZES)
    assert result.exit_code == 130
    assert "before the first step was done" in result.stderr
    assert not checkpoint_path(out).exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve documents of about 400 bytes."""
    path = tmp_path_factory.mktemp("documents") / "corpus"
    path.mkdir()
    for name in "abcdefghijkl":
        (path / name).write_text("".join(f"{name} says {n * n % 97}.\n" for n in range(40)))
    return path


def test_documents_are_packed_and_a_share_is_held_out_and_measured(folder, tmp_path):
    out = tmp_path / "forecast.safetensors"
    asked = ["--tokens", 1500, "--held-out", 0.2, "--held-out-batches", 2, "--measure-every", 4]
    result = run("--document", folder, "--out", out, "--json", *asked, *SIZES)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    about = said["documents"]
    assert (about["documents"], len(about["held_out"])) == (10, 2)
    assert about["held_out_sequences"] == 2
    assert about["sequences"] == about["tokens"] // 100
    assert [step["step"] for step in said["steps"]] == list(range(1, 9))
    assert [each["step"] for each in said["held_out"]] == [0, 4, 8]
    assert said["held_out"][-1]["loss"] < said["held_out"][0]["loss"]
    words = f"10 documents of {about['tokens']} tokens, 2 more held out; {about['sequences']} seq"
    assert words in " ".join(result.stderr.split())


def test_more_tokens_than_there_are_go_through_them_again_and_it_is_said(folder, tmp_path):
    out = tmp_path / "forecast.safetensors"
    whole = ["--tokens", 9000, "--held-out", 0, "--selector", "lowbit2", "--seed", 3]
    result = run("--document", folder, "--out", out, *whole, *SIZES)
    assert result.exit_code == 0, result.output
    assert re.search(r"of which 90 are asked for: 1\.\d\d times", result.stderr)
    assert "held-out documents" not in result.stdout
    assert load_forecast(out).info.selector == "lowbit2"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--held-out", 0.05, "--length", 4000], "1 documents are held out. Of these, the doc"),
        (["--held-out", 1.0], "--held-out 1.0 is no share of documents"),
    ],
)
def test_documents_that_do_not_do(folder, tmp_path, options, words):
    result = run("--document", folder, "--out", tmp_path / "f.safetensors", *SIZES, *options)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_tokens_are_those_of_documents(text, tmp_path):
    out = tmp_path / "f.safetensors"
    result = run("--text", text, "--out", out, "--tokens", 100, *SIZES)
    assert result.exit_code == 2
    assert "--tokens counts those of documents" in result.output


def test_processes_that_are_no_whole_replicas_are_refused(text, tmp_path):
    result = run("--text", text, "--out", tmp_path / "x", "--tp", 2, *SIZES)
    assert result.exit_code == 2
    words = " ".join(result.output.replace("\u2502", " ").split())
    assert "--tp 2 shares the model among as many processes, and 1 are running" in words


@pytest.mark.parametrize("number", ["0", "1"])
def test_only_the_first_process_says_what_an_interrupt_left(text, tmp_path, monkeypatch, number):
    def interrupted(self, batches, *rest):
        del self, batches, rest
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.ForecastTrainer, "step", interrupted)
    monkeypatch.setenv("RANK", number)
    result = run("--text", text, "--out", tmp_path / "x", *SIZES)
    assert result.exit_code == 130
    assert ("stopped before the first step" in result.output) == (number == "0")
