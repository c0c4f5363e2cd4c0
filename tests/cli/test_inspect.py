from __future__ import annotations

import json

import pytest

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


def write_config(folder, fields):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


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


def test_unreadable_config(sparda, tmp_path):
    folder = write_config(tmp_path / "model", {"model_type": "no such type"})
    result = sparda("inspect", folder)
    assert result.exit_code == 2
    assert "transformers cannot read" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "tiny-lama"], "Did you mean 'tiny-llama'"),
        (["inspect", "t5"], "no model that can be inspected"),
        (["inspect", "./nowhere"], "has no config.json"),
        (["inspect", "tiny-llama", "--mode", "exacd"], "'exacd' is not one of 'dense'"),
        (["inspect", "tiny-llama", "--machine", "a100"], "not one of 'cpu', 'h100', 'h200'"),
        (["inspect", "tiny-llama", "--top-k", "many"], "or 'all' for every block"),
        (["inspect", "tiny-llama", "--batch", "0"], "greater than or equal to 1"),
        (["inspect", "tiny-llama", "--html", "/dev/null/page.html"], "cannot be written"),
        (["inspect"], "Missing argument"),
    ],
)
def test_wrong_usage(sparda, arguments, words):
    result = sparda(*arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.replace("\u2502", " ").split())
    assert "Traceback" not in result.stderr


def test_inspect_takes_several_hints(sparda, tmp_path):
    page = tmp_path / "page.html"
    named = ("--mode", "exact", "--hint", "ema", "--hint", "forecast")
    result = sparda("inspect", "tiny-llama", *named, "--html", page)
    assert result.exit_code == 0, result.stderr
    text = page.read_text()
    for name in ("predict_blocks_1", "ema_prefetch_1", "forecast_prefetch_1"):
        assert name in text
