from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from sparda_compile.cli import main as cli
from sparda_compile.demo import small_model
from sparda_compile.evaluation.guesses import MIXED, REFERENCES
from sparda_compile.evaluation.vocabulary import NUM_TOKENS
from sparda_compile.forecast.weights import ForecastInfo, ForecastWeights, projections_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUM_TOKENS, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def run(*arguments):
    return CliRunner().invoke(cli.app, ["eval", *map(str, arguments)])


SMALL = ("--tokens", 640, "--samples", 2, "--batch", 2, "--local-blocks", 1, "--budget", 0.4)


def test_table_and_json_file(folder, tmp_path):
    path = tmp_path / "found.json"
    result = run(folder, *SMALL, "--task", "multi_key", "--json-file", path)
    assert result.exit_code == 0, result.output
    assert "query 40%" in result.stdout
    assert "previous_layer" in result.stdout
    assert f"Wrote {path}" in result.stdout.replace("\n", "")
    assert "multi_key, 640 tokens" in result.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "query 40%"]


def test_json_alone_and_several_of_each(folder):
    result = run(
        folder, *SMALL, "--budget", 0.5, "--tokens", 704, "--task", "single_needle", "--mode",
        "query", "--selector", "infllm2", "--selector", "quest", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    names = ["query 40%", "query 50%", "query quest 40%", "query quest 50%"]
    assert [(row["length"], row["name"]) for row in rows] == [
        (length, name) for length in (640, 704) for name in names
    ]


def test_several_formats_of_blocks(folder):
    result = run(
        folder, *SMALL, "--task", "single_needle", "--mode", "dense", "--kv-format", "model",
        "--kv-format", "int4", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    exact, rounded = json.loads(result.stdout)["rows"]
    assert [(row["name"], row["kv_format"]) for row in (exact, rounded)] == [
        ("dense", "model"), ("dense int4", "int4"),
    ]  # fmt: skip
    assert 10 * exact["kl"] < rounded["kl"] > 0


def test_guesses_of_hints_at_several_budgets(folder, tmp_path):
    path = tmp_path / "found.json"
    given = ("--task", "multi_key", "--mode", "query", "--hint", "ema", "--hint", "next_query")
    result = run(folder, *SMALL, *given, "--ema", 0.5, 0.3, 0.25, "--json-file", path)
    assert result.exit_code == 0, result.output
    assert "Who guessed the blocks" in result.stdout
    plain = json.loads(path.read_text())
    (row,) = plain["rows"]
    guesses = {(g["name"], g["budget"]) for g in row["guesses"] if g["layer"] is None}
    names = ("ema", "next_query", *MIXED, *REFERENCES)
    assert guesses == {(name, budget) for name in names for budget in (1.0, 1.25, 1.5, 2.0)}
    assert plain["settings"]["ema_damping"] == 0.25
    assert plain["settings"]["hints"] == ["ema", "next_query"]
    assert "kept from" in run(folder, *SMALL, *given, "--ema", 0.5, 0.3, 0.25, "--json-file",
                              path).stderr  # fmt: skip
    searched = run(folder, *SMALL, *given, "--ema-calibrate", "--json-file", tmp_path / "new.json")
    assert searched.exit_code == 0, searched.output
    assert json.loads((tmp_path / "new.json").read_text())["settings"]["ema_calibrate"]
    wrong = run(folder, *SMALL, *given, "--ema", 0.0, 0.3, 0.25)
    assert wrong.exit_code != 0
    assert "ema_level=0.0" in wrong.stderr.replace("--ema-level ", "ema_level=")


def test_both_repairs_of_speculation(folder, tmp_path):
    path = tmp_path / "found.json"
    given = ("--task", "multi_key", "--mode", "query", "--mode", "speculate",
             "--repair", "exact", "--repair", "union", "--json-file", path)  # fmt: skip
    result = run(folder, *SMALL, *given)
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["query 40%", "speculate 40%", "speculate union 40%"]
    assert rows["speculate 40%"]["kl"] == rows["query 40%"]["kl"]
    assert rows["speculate union 40%"]["kl"] != rows["query 40%"]["kl"]


def trained(path, **sizes):
    """Return a file of Forecast weights for the folder's model."""
    info = ForecastInfo(
        model="LlamaForCausalLM", layers=(0, 1), groups=(2, 2), head_dim=(8, 8), hidden=(32, 32),
        ranks=(None, None), block_size=64, top_k=1, steps=1, num_tokens=640, versions={}, **sizes,
    )  # fmt: skip
    rows = 16 * info.heads
    projections = projections_of({layer: torch.randn(rows, 32) for layer in info.layers})
    return ForecastWeights(projections, info).save(path)


def test_pooled_keys_are_as_said_else_as_the_forecast_had_them(folder, tmp_path):
    def mass(*more):
        result = run(folder, *SMALL, "--task", "key_value", "--mode", "query", *more, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["rows"][0]["recalls"][0]["mass"]

    finer = ("--pool-size", 16, "--pool-stride", 8)
    assert mass() == mass("--pool-size", 32, "--pool-stride", 16)
    assert mass() != mass(*finer)
    forecast = trained(tmp_path / "forecast.safetensors", pool_size=16, pool_stride=8)
    assert mass("--forecast", forecast) == mass(*finer)
    assert mass("--forecast", forecast, "--pool-size", 32, "--pool-stride", 16) == mass()


def test_several_heads_of_a_forecast_are_scored_by_each_selector(folder, tmp_path):
    sizes = {"pool_size": 32, "pool_stride": 16, "heads": 2}
    forecast = trained(tmp_path / "forecast.safetensors", **sizes)
    given = ("--mode", "forecast", "--selector", "infllm2", "--selector", "quest")
    result = run(folder, *SMALL, "--task", "key_value", *given, "--forecast", forecast, "--json")
    assert result.exit_code == 0, result.output
    names = [row["name"] for row in json.loads(result.stdout)["rows"]]
    assert names == ["forecast 40%", "forecast quest 40%"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pool-stride", "24"], "--pool-stride 24 must divide"),
        (["--mode", "fast"], "is not one of 'dense'"),
        (["--repair", "union"], "--repair is what mode speculate does; add --mode speculate"),
        (["--budget", "2"], "less than or equal to 1"),
        (["--budget", "0"], "is not a share"),
        (["--task", "poetry"], "is not one of 'single_needle'"),
        (["--tokens", "10"], "--tokens 10 is too small: the haystack needs"),
        (["--tokens", "640"], "lower --local-blocks, raise --tokens, or use a budget of 0.40"),
        (["--device", "abc"], "--device 'abc' is no device; use cpu"),
        (["--selector", "nosa"], "--short-list 23 is more than the 2 blocks that --budget 0.1"),
    ],
)
def test_wrong_usage(folder, arguments, words):
    result = run(folder, *arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.replace("\u2502", " ").split())


def test_model_without_retention(folder):
    result = run(folder, *SMALL, "--mode", "query", "--selector", "nosa", "--short-list", 1)
    assert result.exit_code == 1, result.output
    assert "keys that carry a retention score" in " ".join(result.stderr.split())


def test_no_such_folder(tmp_path):
    result = run(tmp_path / "nothing")
    assert result.exit_code == 2
    assert "no folder with a config.json" in " ".join(result.stderr.split())


def test_small_model_without_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(small_model, "small_model_folder", lambda: tmp_path)
    result = run()
    assert result.exit_code == 1
    assert "weights are missing" in " ".join(result.stderr.split())


def test_an_interrupted_evaluation_keeps_its_parts_and_goes_on(folder, tmp_path, monkeypatch):
    from sparda_compile.evaluation import run as evaluation

    path = tmp_path / "found.json"
    tasks = ("--task", "single_needle", "--task", "multi_key", "--mode", "query")
    arguments = (folder, *SMALL, "--batch", 1, *tasks, "--json-file", path)
    measure, asked = evaluation.evaluate, []

    def interrupted(*args, tasks, **settings):
        asked.append(tasks[0])
        if asked == ["single_needle", "multi_key"]:
            raise KeyboardInterrupt
        return measure(*args, tasks=tasks, **settings)

    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    result = run(*arguments)
    assert result.exit_code == 130, result.output
    said = " ".join(result.stderr.split())
    assert "stopped after 1 of 2 parts" in said
    assert "the same command goes on with the others" in said
    assert "s left" in said
    assert [row["task"] for row in json.loads(path.read_text())["rows"]] == ["single_needle"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert asked == ["single_needle", "multi_key", "multi_key"]
    assert "single_needle, 640 tokens: kept from" in " ".join(result.stderr.split())
    rows = json.loads(path.read_text())["rows"]
    assert [row["task"] for row in rows] == ["single_needle", "multi_key"]
    monkeypatch.undo()
    assert json.loads(run(*arguments[:-2], "--json").stdout)["rows"] == rows


def test_without_a_file_an_interrupt_says_what_would_have_kept(folder, monkeypatch):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparda_compile.evaluation.run.evaluate", interrupted)
    result = run(folder, *SMALL)
    assert result.exit_code == 130
    assert "with --json-file they are, part by part" in " ".join(result.stderr.split())
