"""docs/models.md is generated from the models that are tested, so it says no more than they do.

What only a traced model tells, its sites or the reason of its refusal, is compared where the models
are traced anyway: in tests/e2e/test_models.py, test_families.py and test_unsupported.py.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any, get_args

import pytest

from sparda_compile import SpardaConfig, explain
from sparda_compile.config import Mode
from sparda_compile.testing import FAMILIES, TINY_MODELS, UNSUPPORTED_MODELS, build, build_form

if TYPE_CHECKING:
    from collections.abc import Iterable

UPDATE = os.environ.get("SPARDA_UPDATE_GOLDEN") == "1"

# What a family brings that the plainest one does not.
DIFFERENCES = {
    "llama": "grouped queries, RoPE (plain, linear and llama3 scaling), optional biases",
    "qwen2": "biases on query, key and value",
    "qwen3": "norms on queries and keys",
    "mistral": "a window on every layer where the config sets one",
    "mixtral": "mixture of experts",
    "qwen3_moe": "mixture of experts, norms on queries and keys",
    "phi3": "one fused projection for query, key and value; partial RoPE",
    "gemma3": "sliding and full layers, two RoPE bases, norms on queries and keys, own scale",
    "glm4": "interleaved partial RoPE, norms after the branches",
    "gpt2": "learned positions, fused projection, no groups; optional scale per layer",
    "minicpm4": "LongRoPE tables, scaled embeddings, residuals and head",
    "plain": "any module `forward(input_ids, position_ids) -> logits`; no cache, no `generate`",
}

# What a refused model is; the last five are hand-made.
ODDITIES = {
    "deepseek_v3": "multi-head latent attention",
    "gpt_oss": "attention sinks",
    "bloom": "ALiBi biases",
    "qwen3_next": "layers of linear attention",
    "lfm2": "layers of short convolutions",
    "mamba": "a state space, no attention",
    "t5": "encoder and decoder",
    "bart": "encoder and decoder",
    "bidirectional": "hand-made: no causal mask",
    "alibi_bias": "hand-made: scores fall with distance",
    "interleaved_groups": "hand-made: query head h reads KV head h mod G",
    "no_position_ids": "hand-made: forward takes tokens alone",
    "prefix_lm": "hand-made: every token sees the first eight",
}

INTRODUCTION = """\
# Models

Made by `tests/test_docs_models.py` from the models that the tests build; set
`SPARDA_UPDATE_GOLDEN=1` to write it again. What counts is the graph, not the name: any causal LM
whose attention is found and proved equal to causal attention is rewritten, and any other is
refused with its reason. `sparda_compile.explain(model)` says which of the two it is.

## Covered

With a full budget each generates the tokens of the original model, in each mode named here, for
prompts of 1 to 700 tokens and ragged batches (`tests/e2e/test_models.py`). Those with mode `query`
alone have the original's logits and tokens in that mode (`tests/e2e/test_families.py`); with
`SPARDA_MATRIX=all` that test tries every mode, and what their configs can switch. *Sparse*
attentions read selected blocks; *window* ones are dense over their sliding window. Sites are those
of the tiny model.
"""

RETENTION = """
## Retention scores

Selector `nosa` reads a score of each token in each KV head, the same for every query, from the
last channel of the keys. A model takes part by widening its heads, in plain attention with an
explicit `scale`:

- a rotated key gets the channel c / scale behind zeros that fill its width, best to a multiple of
  16; c is the score, and its token weighs exp(c) times as much;
- a rotated query gets the same zeros and then the constant 1, so q . k * scale has c added;
- a value gets zeros, and the attention output drops that many channels.

`optimize` looks for the constant 1 and refuses `nosa` without it. The other selectors also run on
such a model; they score with c as part of the key. `tiny_nosa` of `sparda_compile.testing` is one
(`tests/e2e/test_nosa.py`); the class to look at is `sparda_compile.testing.nosa.NosaAttention`.
"""

REFUSED = """
## Refused

`optimize` raises the reason and leaves the model as it was (`tests/e2e/test_unsupported.py`).
"""


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def covered_row(page: Any, name: str) -> tuple[str, ...]:
    model = build(name)
    if UPDATE:
        report = explain(model, SpardaConfig(mode="query", lowering="eager"))
        assert report.error == ""
        sites = page.sites(report.sites)
    else:
        sites = page.rows()[type(model).__name__][3]
    forms = "sdpa" if name == "plain" else "sdpa, eager"
    return (f"`{type(model).__name__}`", forms, DIFFERENCES[name], sites, ", ".join(get_args(Mode)))


def family_row(page: Any, name: str) -> tuple[str, ...]:
    family = FAMILIES[name]
    model = build_form(name, attn_implementation=family.attentions[0])
    if UPDATE:
        report = explain(model, SpardaConfig(mode="query", lowering="eager"))
        assert report.error == ""
        sites = page.sites(report.sites)
    else:
        sites = page.rows()[type(model).__name__][3]
    forms = ", ".join(family.attentions)
    return f"`{type(model).__name__}`", forms, family.brings, sites, "query"


def refused_row(page: Any, name: str) -> tuple[str, ...]:
    make, _ = UNSUPPORTED_MODELS[name]
    model = make()
    if UPDATE:
        reason = page.reason(model, explain(model).error)
    else:
        reason = page.rows()[type(model).__name__][2]
    return f"`{type(model).__name__}`", ODDITIES[name], reason


def document(page: Any) -> str:
    header = ("Model", "Attention forms", "What differs", "Sites", "Modes")
    rows = [covered_row(page, name) for name in TINY_MODELS]
    covered = table(header, rows + [family_row(page, name) for name in FAMILIES])
    refused = table(
        ("Model", "What it has", "Reason given"),
        [refused_row(page, name) for name in UNSUPPORTED_MODELS],
    )
    return "\n".join([INTRODUCTION, *covered, RETENTION.rstrip(), REFUSED, *refused, ""])


@pytest.fixture(scope="module")
def text(models_page: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return document(models_page)


def test_document_is_what_the_models_give(models_page: Any, text: str) -> None:
    if UPDATE:
        models_page.path.parent.mkdir(exist_ok=True)
        models_page.path.write_text(text, encoding="utf-8")
    written = models_page.path.read_text(encoding="utf-8")
    assert written == text, "docs/models.md is out of date: write it with SPARDA_UPDATE_GOLDEN=1"


def test_every_model_is_described() -> None:
    assert DIFFERENCES.keys() == TINY_MODELS.keys()
    assert ODDITIES.keys() == UNSUPPORTED_MODELS.keys()


def test_document_is_ascii_and_names_each_refused_model_once(text: str) -> None:
    assert text.isascii()
    refused = text.partition("## Refused")[2]
    assert refused.count("\n| `") == len(UNSUPPORTED_MODELS)
    assert all(len(line) < 250 for line in text.splitlines())
