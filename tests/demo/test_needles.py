from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from sparda_compile.cli.tables import print_demo
from sparda_compile.demo import needles as needle_demo
from sparda_compile.demo import small_model
from sparda_compile.errors import BackendUnavailableError, ConfigError
from sparda_compile.evaluation.tasks import make_batch
from sparda_compile.evaluation.vocabulary import NUM_TOKENS, spell

TOKENS = 1300


@pytest.fixture(scope="module")
def model():
    """A model that knows nothing: its answers are wrong, and the same in every dense run."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUM_TOKENS, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def result(model):
    said = []
    demo = needle_demo.run_needle_demo(
        model, modes=["dense", "query", "exact"], num_tokens=2560, progress=said.append
    )
    assert said == [
        f"reading {demo.num_tokens} tokens with the original model", "mode dense", "mode query",
        "mode exact",
    ]  # fmt: skip
    return demo


def test_answers_are_those_of_greedy_decoding(model, result):
    batch = make_batch("multi_query", batch_size=1, length=2560, seed=0)
    ids = batch.ids_BT[:, : batch.question_start].clone()
    answers = []
    for place in range(batch.question_start, 2560):
        token = batch.ids_BT[:, place : place + 1]
        if place in batch.answer_positions_A.tolist():
            with torch.no_grad():
                token = model(ids, logits_to_keep=1).logits.argmax(-1)
            answers.append(spell(int(token)))
        ids = torch.cat([ids, token], dim=1)
    assert result.rows[0].answers == tuple(answers)


def test_wrong_answers_are_told(result):
    wrong = [row.mode for row in result.rows if row.answers != result.right_answers]
    assert wrong == ["dense", "query", "exact"]
    assert [words.split()[1] for words in result.mismatches] == wrong
    assert all(", ".join(result.right_answers) in words for words in result.mismatches)


def test_exact_answers_as_query_does(result):
    _, query, exact = result.rows
    assert exact.answers == query.answers
    assert exact.recall == query.recall


def test_rows_say_what_was_read(result):
    dense, query, _ = result.rows
    assert dense.blocks == dense.num_blocks == 40
    assert dense.recall is None
    assert query.blocks == 4
    assert 0.0 <= query.recall <= 1.0


def test_table_marks_and_json(result):
    console = Console(width=120, file=io.StringIO())
    print_demo(result, console)
    text = console.file.getvalue()
    assert all(" ".join(row.answers) in text for row in result.rows)
    assert f"at token {result.places[0]}" in text
    plain = result.to_dict()
    assert len(plain["rows"]) == 3
    assert plain["mismatches"]


def test_haystack_too_small_for_the_budget(model):
    with pytest.raises(ConfigError, match="always read"):
        needle_demo.run_needle_demo(model, num_tokens=TOKENS)


def test_shipped_model_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(small_model, "small_model_folder", lambda: tmp_path)
    with pytest.raises(BackendUnavailableError):
        needle_demo.run_shipped_model()


def test_shipped_model_answers_rightly():
    demo = needle_demo.run_shipped_model(num_tokens=4096, seed=2)
    assert [row.mode for row in demo.rows] == ["dense", "query", "forecast", "exact", "speculate"]
    assert demo.mismatches == ()
    assert min(row.num_right for row in demo.rows) == 4
