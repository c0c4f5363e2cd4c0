from __future__ import annotations

import json

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text import run as text_run
from sparda_compile.evaluation.text.cases import Case
from sparda_compile.evaluation.text.oracle import ORACLE, oracle_selector
from sparda_compile.evaluation.text.results import TextFile, rows_of
from sparda_compile.evaluation.text.run import (
    TextEvaluation,
    TextPart,
    make_scripts,
    text_scripts,
)
from sparda_compile.testing import tiny_llama

BASE = SpardaConfig(
    mode="query", block_size=16, top_k=2, local_blocks=1, lowering="eager", offload="never",
    prefill="dense", progress=False,
)  # fmt: skip
COUNTS = {"scored": 8, "trials": 2, "depths": 2, "seed": 0}
FEW, ALL = Case("few", BASE), Case("all", BASE.replace(top_k=None))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_llama()


def file_of(path):
    return json.loads(path.read_text())


def evaluate(model, documents, file, cases, said=None, batch_size=2):
    parts = [TextPart("perplexity", 240, text_scripts(documents, 240, 8), cases)]
    say = (lambda _: None) if said is None else said.append
    TextEvaluation(model, None, file, batch_size, say).measure(parts)
    return {row.case: row for row in rows_of(file.records)}


def test_samples_are_the_first_tokens_of_documents(documents):
    made = text_scripts(documents, 240, 8)
    assert [script.name for script in made] == [each.name for each in documents.each]
    read, steps = made[0].parts
    ids = documents.each[0].ids_T[:240]
    assert torch.equal(read.ids_BT[0], ids[:231])
    assert torch.equal(steps.ids_BT[0], ids[231:239])
    assert torch.equal(steps.targets_BA[0], ids[232:240])
    with pytest.raises(ConfigError, match="leaves no prompt; score 238 or fewer"):
        text_scripts(documents, 240, 239)


def test_rows_are_what_the_model_and_a_full_budget_say(model, documents):
    rows = evaluate(model, documents, TextFile(None, {}), [FEW, ALL])
    assert [*rows] == ["dense", "few", "all"]
    ids = torch.stack([each.ids_T[:240] for each in documents.each])
    logits = model(ids).logits[:, 231:239]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 232:].flatten())
    assert rows["dense"].perplexity.value == pytest.approx(nll.exp().item(), rel=1e-5)
    assert rows["dense"].num_samples == 3
    assert rows["all"].ratio.value == pytest.approx(1.0, abs=1e-5)
    assert rows["all"].kl.value < 1e-6
    assert rows["few"].kl.value > 1e-4
    assert rows["few"].budget == pytest.approx(5 / 15)


def test_samples_at_once_change_nothing(model, documents):
    one, two = (
        evaluate(model, documents, TextFile(None, {}), [FEW], batch_size=size)["few"].kl.value
        for size in (1, 3)
    )
    assert one == pytest.approx(two, rel=1e-3)


def test_a_cut_evaluation_goes_on_where_it_stood(model, documents, tmp_path, monkeypatch):
    measured = []
    run_module = text_run.module_logits

    def counted(module, parts, reading):
        measured.append((module.sparda_config.top_k, len(parts[0].ids_BT)))
        if len(measured) == 4:
            raise KeyboardInterrupt
        return run_module(module, parts, reading)

    monkeypatch.setattr(text_run, "module_logits", counted)
    path = tmp_path / "found.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, documents, TextFile(path, {}), [FEW, ALL])
    # Two documents at once, then one; the last configuration of the last one was cut.
    assert measured == [(2, 2), (None, 2), (2, 1), (None, 1)]
    said = []
    rows = evaluate(model, documents, TextFile(path, {}), [FEW, ALL], said)
    assert measured[4:] == [(None, 1)]
    assert "kept from" in said[0]
    assert said[-1].startswith("[")
    assert "all" in said[-1]
    assert rows["all"].num_samples == 3
    assert rows["all"].kl.value < 1e-6 < rows["few"].kl.value
    assert len(file_of(path)["records"]) == 9


def test_a_bar_fills_and_says_what_is_left(model, documents):
    said = []
    evaluate(model, documents, TextFile(None, {}), [FEW], said, batch_size=3)
    # The model's work is the prompt's 231 tokens and 8 more, a configuration's 8 steps.
    assert [line.count("#") for line in said] == [0, round(20 * 239 / (239 + 8 * 16))]
    assert "s left" in said[1]
    assert "perplexity, 240 tokens" in said[1]


@pytest.mark.parametrize(("task", "count"), [("perplexity", 3), ("needle", 2), ("chat", 2)])
def test_every_task_has_its_samples(task, count, documents, byte_tokenizer):
    assert len(make_scripts(task, byte_tokenizer, documents, 1200, COUNTS)) == count


def test_conversations_have_a_record_for_each_question(model, documents, byte_tokenizer):
    file = TextFile(None, {})
    (script,) = make_scripts("chat", byte_tokenizer, documents, 1200, {**COUNTS, "trials": 1})
    part = TextPart("chat", 1200, [script], [FEW])
    TextEvaluation(model, None, file, 1, lambda _: None).measure([part])
    assert [(r.case, r.label) for r in file.records] == [
        (case, label) for case in ("dense", "few") for label in script.labels
    ]
    assert len(set(script.labels)) == 4


@pytest.mark.gpu
def test_on_a_gpu(model, documents):
    copy = tiny_llama().bfloat16().cuda()
    copy.load_state_dict(model.state_dict())
    with oracle_selector():
        base = BASE.replace(lowering="inductor")
        cases = [Case(rule, base.replace(selector=rule)) for rule in ("lowbit2", ORACLE)]
        cases += [Case("all", base.replace(top_k=None))]
        rows = evaluate(copy, documents, TextFile(None, {}), cases)
    assert rows["all"].kl.value < 1e-2
    assert rows[ORACLE].kl.value < 10 * rows["lowbit2"].kl.value
    assert all(0.0 <= row.kl.value < 1.0 for row in rows.values())
