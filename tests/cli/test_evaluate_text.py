from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from sparda_compile.cli import main as cli
from sparda_compile.evaluation.text import run as text_run


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    for name in ("one", "two"):
        (path / f"{name}.txt").write_text(" ".join(f"Line {i} of {name}." for i in range(80)))
    return path


SMALL = ("--tokens", 400, "--scored", 3, "--block-size", 16, "--local-blocks", 1)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["eval", "text", *map(str, arguments)])


def words(text):
    return " ".join(text.replace("\u2502", " ").split())


def test_tables_json_and_plot(folder, texts, tmp_path):
    path, plot = tmp_path / "found.json", tmp_path / "found.svg"
    tasks = ("--task", "perplexity", "--task", "needle", "--trials", 2, "--depths", 2)
    files = ("--json-file", path, "--plot", plot, "--commit", "abc")
    result = run(folder, "--document", texts, *SMALL, "--budget", 0.2, *tasks, *files)
    assert result.exit_code == 0, result.output
    for shown in ("oracle 20%", "query infllm2 20%", "needle (2)", "2 documents, 400 tokens each"):
        assert shown in result.stdout
    assert "[####" in result.stderr
    assert "<svg" in plot.read_text()
    found = json.loads(path.read_text())
    assert [(row["task"], row["case"]) for row in found["rows"]] == [
        (task, case)
        for task in ("perplexity", "needle")
        for case in ("dense", "oracle 20%", "query infllm2 20%")
    ]
    assert [each["name"].rpartition("/")[2] for each in found["documents"]] == [
        "one.txt", "two.txt",
    ]  # fmt: skip
    assert found["environment"]["commit"] == "abc"
    assert found["settings"]["scored"] == 3
    assert found["model"]["name"] == folder.name
    kl = {row["case"]: row["kl"]["value"] for row in found["rows"][:3]}
    assert kl["dense"] == 0.0 < kl["query infllm2 20%"]


def test_formats_of_blocks_are_measured_beside_each_other(folder, texts):
    result = run(
        folder, "--document", texts, *SMALL, "--mode", "dense", "--mode", "query", "--budget", 0.2,
        "--kv-format", "model", "--kv-format", "int4", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = {row["case"]: row for row in json.loads(result.stdout)["rows"]}
    assert [(case, row["kv_format"]) for case, row in rows.items()] == [
        ("dense", "model"), ("oracle 20%", "model"), ("module, dense", "model"),
        ("module, dense, int4", "int4"), ("query infllm2 20%", "model"),
        ("query infllm2 20%, int4", "int4"),
    ]  # fmt: skip
    kl = {case: row["kl"]["value"] for case, row in rows.items()}
    assert 10 * kl["module, dense"] < kl["module, dense, int4"] > 0


def test_another_selector_is_measured_beside_what_is_there(folder, texts, tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    given = (folder, "--document", texts, *SMALL, "--json-file", path, "--no-oracle")
    assert run(*given, "--top-k", 2).exit_code == 0
    measured, module_logits = [], text_run.module_logits

    def counted(module, *rest):
        measured.append(module.sparda_config.selector)
        return module_logits(module, *rest)

    monkeypatch.setattr(text_run, "module_logits", counted)
    both = ("--top-k", 2, "--selector", "infllm2", "--selector", "quest")
    result = run(*given, *both, "--json")
    assert result.exit_code == 0, result.output
    assert measured == ["quest"]
    cases = [row["case"] for row in json.loads(result.stdout)["rows"]]
    assert cases == ["dense", "query infllm2 top 2", "query quest top 2"]
    assert "kept from" in words(run(*given, *both).stderr)
    other = run(*given, "--scored", 4)
    assert other.exit_code == 2
    assert "was made with other settings" in words(other.stderr)


@pytest.mark.filterwarnings("ignore:.*Forecast")
def test_modes_hints_and_prompts(folder, texts):
    modes = ("--mode", "query", "--mode", "exact", "--mode", "forecast", "--mode", "dense")
    given = (*modes, "--hint", "ema", "--hint", "next_query")
    result = run(
        folder, "--document", texts / "one.txt", *SMALL, *given, "--budget", 0.2, "--prefill",
        "dense", "--prefill", "sparse", "--no-oracle", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = {row["case"]: row for row in json.loads(result.stdout)["rows"]}
    names = ["query infllm2", "exact infllm2 by ema", "exact infllm2 by next_query"]
    assert [*rows] == [
        "dense",
        *(
            f"{name} 20%{ending}"
            for name in [*names, "forecast infllm2"]
            for ending in ("", ", sparse prompt")
        ),
        "module, dense",
    ]
    # Hints change what is fetched, and no result; a sparse prompt changes both.
    kl = {name: row["kl"]["value"] for name, row in rows.items()}
    assert kl["query infllm2 20%"] == kl["exact infllm2 by ema 20%"]
    assert kl["query infllm2 20%"] == kl["exact infllm2 by next_query 20%"]
    assert kl["query infllm2 20%, sparse prompt"] != kl["query infllm2 20%"]
    assert kl["forecast infllm2 20%"] not in (kl["query infllm2 20%"], 0.0)
    assert kl["module, dense"] < 1e-6 < kl["query infllm2 20%"]
    assert rows["query infllm2 20%"]["kl"]["low"] is None


def test_prompts_by_another_selector(folder, texts):
    given = (
        folder, "--document", texts / "one.txt", *SMALL, "--mode", "query", "--selector",
        "lowbit2", "--budget", 0.2, "--prefill", "sparse", "--no-oracle", "--json",
    )  # fmt: skip
    found = []
    others = (("--prefill-selector", "infllm2"), ("--prefill-candidates", 1))
    for more in ((), *others):
        result = run(*given, *more)
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout)["rows"][1])
    ends = ("", " by infllm2", " of 1x candidates")
    assert [row["case"] for row in found] == [f"query lowbit2 20%, sparse prompt{e}" for e in ends]
    assert [row["prefill_selector"] for row in found] == ["", "infllm2", ""]
    assert [row["prefill_candidates"] for row in found] == [0.0, 0.0, 1.0]
    assert len({row["kl"]["value"] for row in found}) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prefill-selector", "infllm2"], "no prompt is sparse here; add --prefill sparse"),
        (["--prefill-candidates", "2"], "--prefill-candidates 2.0 is how tokens of a sparse"),
        (["--selector", "best"], "is not one of 'infllm2', 'quest', 'nosa', 'lowbit2'"),
        (["--tokens", "5000"], "one.txt has 1269 tokens, fewer than the 5000 that are read"),
        (["--task", "needle", "--tokens", "600"], "--tokens 600 is more than the 512 positions"),
        (["--task", "needle", "--tokens", "80"], "--tokens 80 leaves 0 tokens of text around"),
        (["--scored", "400"], "--scored 400 of --tokens 400 tokens leaves no prompt"),
        (["--budget", "0.01"], "--budget 0.01 of 25 blocks is fewer than the 3 that are always"),
        (["--task", "poetry"], "is not one of 'perplexity', 'needle', 'chat'"),
        (["--task", "needle", "--plot", "a.png"], "--plot draws perplexity; add --task perplexity"),
        (["--selector", "nosa"], "--short-list 23 is more than the 15 blocks that --budget 0.7"),
        (["--device", "abc"], "--device 'abc' is no device"),
        (["--document", "nothing.txt"], "nothing.txt is neither a file nor a folder"),
    ],
)
def test_wrong_usage(folder, texts, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    budget = () if "--budget" in arguments else ("--budget", 0.7)
    result = run(folder, "--document", texts / "one.txt", *SMALL, *budget, *arguments)
    assert result.exit_code == 2, result.output
    assert said in words(result.stderr)


def test_files_that_are_no_text(folder, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    result = run(folder, "--document", tmp_path / "picture.png", *SMALL)
    assert result.exit_code == 2
    assert "picture.png is no text: its byte 0 is not UTF-8" in words(result.stderr)


def test_models_without_a_tokenizer(folder, texts, tmp_path):
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    for model, said in ((tmp_path, "has no tokenizer that"), ("small", "'small' has no tokenizer")):
        result = run(model, "--document", texts, *SMALL)
        assert result.exit_code == 2
        assert said in words(result.stderr)


def test_a_tokenizer_of_another_model(folder, texts, tmp_path, byte_tokenizer):
    config = LlamaConfig.from_pretrained(folder, vocab_size=60)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    result = run(tmp_path, "--document", texts, *SMALL)
    assert result.exit_code == 2
    assert "and the model has 60: it is not this model's" in words(result.stderr)


@pytest.mark.parametrize("has_file", [True, False])
def test_interrupted(has_file, folder, texts, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(text_run, "module_logits", interrupted)
    path = tmp_path / "found.json"
    file = ("--json-file", path) if has_file else ()
    result = run(folder, "--document", texts, *SMALL, "--budget", 0.2, *file)
    assert result.exit_code == 130, result.output
    if has_file:
        assert "the same command goes on from there" in words(result.stderr)
        assert [r["case"] for r in json.loads(path.read_text())["records"]] == ["dense", "dense"]
    else:
        assert "nothing was kept. With --json-file it is" in words(result.stderr)
