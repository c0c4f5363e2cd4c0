"""The tables of arguments are complete: a new version of transformers that adds one fails here."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import TransformersKwargs

from sparda_compile import SpardaConfig, optimize
from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.module.arguments import CONFIG, FORWARD, GENERATE

IS_OLD = CACHE_NAME != "cache"
IDS = torch.arange(2, 22)[None]


@pytest.fixture(scope="module")
def fast(traced_llama):
    return optimize(
        traced_llama, SpardaConfig(mode="query", top_k=None, lowering="eager", block_size=16)
    )


def named(table):
    """Return what this version of transformers has to have, and what it may have."""
    must = {n for n, row in table.items() if row.only in ("", "5.17" if IS_OLD else "5.24")}
    return must, set(table) if IS_OLD else must


def compare(table, found):
    must, may = named(table)
    assert must - found == set(), "rows of nothing"
    assert found - may == set(), "arguments without a row"


def forward_arguments():
    """Return the arguments of every causal LM's forward; imports none of them."""
    names = {
        n
        for v in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for n in ([v] if isinstance(v, str) else v)
    }
    found, one_class = set(), r"^class (\w+)\(.*?(?=^(?:class|def|@|[A-Z_]+ =|__all__)|\Z)"
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for match in re.finditer(one_class, path.read_text("utf-8"), re.MULTILINE | re.DOTALL):
            name = match[1]
            is_text = name in names and not name.endswith("ForConditionalGeneration")
            if not (is_text or name.endswith("ForCausalLM")):
                continue
            for node in ast.walk(ast.parse(match[0])):
                if isinstance(node, ast.FunctionDef) and node.name == "forward":
                    found |= {a.arg for a in node.args.args + node.args.kwonlyargs} - {"self"}
    return found


def test_forward():
    compare(FORWARD, forward_arguments() | set(TransformersKwargs.__annotations__))


def test_generate():
    found = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    source = inspect.getsource(GenerationMixin.generate)
    source += inspect.getsource(GenerationMixin._extract_generation_mode_kwargs)
    found |= set(re.findall(r'[^_]kwargs\.pop\("(\w+)"', source))
    compare(GENERATE, found | {"return_dict"})
    assert "return_dict" in FORWARD
    read = set(re.findall(r'[^_]kwargs\.get\("(\w+)"', source))
    assert read <= FORWARD.keys() | CONFIG.keys() | GENERATE.keys()


def test_config():
    compare(CONFIG, set(vars(GenerationConfig())))


def test_an_attribute_that_only_a_newer_version_has(fast, monkeypatch):
    rest = {name: row for name, row in CONFIG.items() if name != "top_h"}
    monkeypatch.setattr("sparda_compile.module.calls.CONFIG", rest)
    for settings in ({"top_h": 0.5}, {"generation_config": GenerationConfig(top_h=0.5)}):
        with pytest.raises(UnsupportedInputError, match=r"^top_h is no argument"):
            fast.generate(IDS, **settings)
    fast.generate(IDS, max_new_tokens=2, generation_config=GenerationConfig(note="x"))


@pytest.mark.parametrize(
    ("name", "near"),
    [("attention_masc", "attention_mask"), ("max_new_token", "max_new_tokens")],
)
def test_a_misspelled_name(fast, name, near):
    with pytest.raises(UnsupportedInputError, match=rf"^{name} is no .*did you mean {near}"):
        fast.generate(IDS, **{name: None})
    with pytest.raises(UnsupportedInputError, match=r"^quux is no argument of forward"):
        fast(IDS, quux=None)
