"""EleutherAI's harness on an optimized module, by the program of docs/quality.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval, EleutherAI's harness")
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quality.md"
# What the page's program names, and what it gets here; the first one a folder.
SHOWN = {
    '"path/to/model"': "",
    'tasks=["gsm8k"]': "tasks=the_tasks",
    "top_k=6, local_blocks=2": 'top_k=None, lowering="eager"',
}


def tasks(folder):
    """Return a task that generates and one that compares log-likelihoods, of one local file."""
    questions = [{"q": "One and one is", "a": "two"}, {"q": "Two and two is", "a": "four"}]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, questions)))
    shared = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test", "doc_to_text": "{{q}}",
    }  # fmt: skip
    generates = {
        "task": "says", "output_type": "generate_until", "doc_to_target": " {{a}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    compares = {
        "task": "prefers", "output_type": "multiple_choice", "doc_to_choice": [" two", " four"],
        "doc_to_target": "{{[' two', ' four'].index(' ' + a)}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    return [shared | generates, shared | compares]


def answers(model, folder):
    """Return what a harness's model said: texts, and log-likelihoods of each choice."""
    samples = lm_eval.simple_evaluate(model, tasks=tasks(folder), bootstrap_iters=0)["samples"]
    texts = [sample["resps"][0][0] for sample in samples["says"]]
    scores = [float(resp[0][0]) for sample in samples["prefers"] for resp in sample["resps"]]
    return texts, scores


def program():
    text = PAGE.read_text(encoding="utf-8")
    (found,) = re.findall(r"^```python\n(.*?lm_eval.*?)^```", text, re.DOTALL | re.MULTILINE)
    return found


@pytest.mark.filterwarnings("ignore")
def test_the_program_of_the_page_runs_and_says_what_the_model_says(
    tmp_path, byte_tokenizer, capsys
):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, eos_token="~")
    tokenizer.save_pretrained(tmp_path)
    text, scope = program(), {"the_tasks": tasks(tmp_path)}
    for shown, used in SHOWN.items():
        assert shown in text
        text = text.replace(shown, used or repr(str(tmp_path)))
    exec(compile(text, PAGE.name, "exec"), scope)
    assert "'prefers'" in capsys.readouterr().out
    texts, scores = answers(scope["lm"], tmp_path)
    plain_texts, plain_scores = answers(HFLM(pretrained=model, tokenizer=tokenizer), tmp_path)
    assert texts == plain_texts
    assert len(texts[0]) > 0
    assert len(scores) == 4
    assert scores == pytest.approx(plain_scores, abs=1e-3)
