from __future__ import annotations

import copy
import json

import pytest
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from sparda_compile.cli import main as cli
from sparda_compile.testing import tiny_llama

SMALL = ("--block-size", 16, "--local-blocks", 1, "--max-new-tokens", 4)
DOCUMENT = " ".join(f"Line {i} of the text." for i in range(40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer):
    path = tmp_path_factory.mktemp("model")
    tiny_llama(max_position_embeddings=1200).save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "it.txt"
    path.write_text(DOCUMENT)
    return path


def run(*arguments, lines=""):
    return CliRunner().invoke(cli.app, ["chat", *map(str, arguments)], input=lines)


def words(text):
    return " ".join(text.replace("\u2502", " ").split())


def test_a_pipe_gets_answers_alone(folder, document):
    given = (folder, "--document", document, *SMALL)
    result = run(*given, lines="One?\n\n/mode exact\nTwo?\n/stats\n")
    assert result.exit_code == 0, result.output
    said = words(result.stderr)
    assert f"{len(DOCUMENT) + len('<user>'):,} tokens in " in said
    assert "/mode exact: 8" in said
    assert "tokens taken over from the cache" in said
    assert "14 of 56 blocks read" in said
    assert "misses" in said
    as_json = run(*given, "--json", lines="One?\n/mode exact\nTwo?")
    turns = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert [turn["question"] for turn in turns] == ["One?", "Two?"]
    assert turns[1]["read_tokens"] == 1 + len("</><user>Two?</><assistant>")
    # A quarter of the blocks that the text had when it was read, and when the mode was set.
    assert [turn["blocks_read"] for turn in turns] == [13, 14]
    assert turns[0]["h2d_bytes"] > 0
    # No terminal, so no prompt and no status: what was written is the answers.
    assert result.stdout == "".join(f"{turn['answer']}\n" for turn in turns)


def test_settings_by_flags(folder):
    flags = (
        "--mode", "exact", "--selector", "quest", "--hint", "previous_step", "--top-k", 2,
        "--prefill", "dense", "--prefill-selector", "infllm2", "--offload", "never",
        "--dtype", "bfloat16", "--lowering", "eager", "--kv-format", "int8",
    )  # fmt: skip
    result = run(
        folder, *SMALL, *flags, lines="/settings\nOne?\n/stats\n/kv-format int4\nTwo?\n/stats\n"
    )
    assert result.exit_code == 0, result.output
    for shown in (
        "/mode exact", "/selector quest", "/hint previous_step", "/top-k 2", "/prefill dense",
        "/prefill-selector infllm2", "/budget not set", "/offload never", "/kv-format int8",
        "/max-new-tokens 4", "cache 27 tokens",
    ):  # fmt: skip
        assert shown in result.stderr
    said = words(result.stderr)
    assert said.index("written in int8.") < said.index("written in int4.")


@pytest.mark.parametrize(
    ("arguments", "lines", "said"),
    [
        (["--budget", "0.1", "--top-k", "3"], "", "--budget and --top-k both say"),
        (["--mode", "best"], "", "is not one of 'dense', 'query'"),
        (["--mode", "speculate"], "", "--offload always keeps them in CPU memory"),
        (["--device", "abc"], "", "--device 'abc' is no device"),
        (
            ["--max-new-tokens", "400"],
            "",
            f"1,200 positions, {len(DOCUMENT) + 6 + 400 - 1200} fewer; name a",
        ),
        (["--document", "nothing.txt"], "", "nothing.txt is neither a file nor a folder"),
        ([], "/poem\n", "/poem is no command; use one of /mode, /selector"),
        ([], "a" * 400, "the conversation and the question and an answer have 1,2"),
    ],
)
def test_wrong_usage(folder, document, arguments, lines, said):
    result = run(folder, "--document", document, *SMALL, *arguments, lines=lines)
    assert result.exit_code == 2, result.output
    assert said in words(result.stderr)
    assert result.stdout == ""


def test_models_without_a_chat_template_need_plain(folder, tmp_path, byte_tokenizer):
    bare = copy.deepcopy(byte_tokenizer)
    bare.chat_template = None
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    result = run(tmp_path, *SMALL, lines="One?")
    assert result.exit_code == 2
    assert "has no chat template" in words(result.stderr)
    assert "add --plain to let it go on with plain text" in words(result.stderr)
    assert run(tmp_path, *SMALL, "--plain", lines="One?").exit_code == 0


@pytest.mark.real_model
@pytest.mark.slow
def test_real_model_answers_on_one_cache(tmp_path):
    text = tmp_path / "it.txt"
    text.write_text("The old name of the harbour is Zarla. " + "Ships come and go. " * 150)
    lines = "What is the old name of the harbour?\nSay the old name once more.\n"
    flags = ("--document", text, "--max-new-tokens", 12, "--budget", 0.5, "--json")
    result = run("smollm2", *flags, lines=lines)
    assert result.exit_code == 0, result.output
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert "Zarla" in first["answer"]
    assert "Zarla" in second["answer"]
    assert second["read_tokens"] < 30 < first["cache_tokens"]
    assert first["blocks_read"] < first["blocks"]
