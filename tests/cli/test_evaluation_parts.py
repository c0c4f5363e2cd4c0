from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from sparda_compile import SpardaConfig
from sparda_compile.cli.evaluation_parts import EvaluationParts, selectors_of
from sparda_compile.errors import ConfigError

CPU = torch.device("cpu")
MODEL = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)


def parts(**changes):
    fields = {
        "bases": [SpardaConfig(mode="dense"), SpardaConfig(mode="query", local_blocks=1)],
        "budgets": (0.4, 0.5), "prompts": ("dense",),
        "tasks": ("multi_key",), "lengths": (640,), "num_samples": 2,
        "batch_size": 2, "seed": 0, "as_bytes": False,
    }  # fmt: skip
    return EvaluationParts(**{**fields, **changes})


def test_dense_is_measured_once_and_others_at_each_budget():
    assert list(parts().configs(640)) == ["dense", "query 40%", "query 50%"]
    parts().check(MODEL, CPU)


def test_names_say_the_format_of_blocks_where_it_is_not_the_models():
    formats = [SpardaConfig(mode=m, local_blocks=1, kv_format=f) for m, f in (
        ("dense", "model"), ("dense", "int4"), ("query", "fp8"),
    )]  # fmt: skip
    some = parts(bases=formats, prompts=("dense", "alone"), budgets=(0.4,))
    assert list(some.configs(640)) == [
        "dense", "dense int4", "query 40% fp8", "query 40% fp8, its prompt alone",
    ]  # fmt: skip
    assert some.configs(640)["dense int4"].kv_format == "int4"


def test_names_say_who_selects_for_a_prompt_where_one_selects():
    base = SpardaConfig(
        mode="query", selector="lowbit2", prefill_selector="infllm2", local_blocks=1
    )
    some = parts(bases=[base], prompts=("dense", "sparse"), budgets=(0.4,))
    names = ["query lowbit2 40%", "query lowbit2 40%, and its prompt by infllm2"]
    assert list(some.configs(640)) == names
    base = base.replace(prefill_selector=None, prefill_candidates=2.0)
    names[1] = "query lowbit2 40%, and its prompt of 2x candidates"
    assert (
        list(parts(bases=[base], prompts=("dense", "sparse"), budgets=(0.4,)).configs(640)) == names
    )


@pytest.mark.parametrize(("as_bytes", "needed"), [(False, 1600), (True, 128)])
def test_a_model_that_lacks_tokens_of_the_tasks_is_refused(as_bytes, needed):
    some = parts(as_bytes=as_bytes, lengths=(3200 if as_bytes else 640,))
    some.check(LlamaConfig(num_hidden_layers=2, vocab_size=needed), CPU)
    with pytest.raises(ConfigError, match=rf"in {needed} tokens, and the model has {needed - 1};"):
        some.check(LlamaConfig(num_hidden_layers=2, vocab_size=needed - 1), CPU)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": (640, 10)}, "length=10 is too small"),
        ({"budgets": (0.1,)}, "lower local_blocks, raise length"),
        ({"lengths": (1 << 40,), "bases": []}, "GiB free"),
    ],
)
def test_what_a_later_part_would_find_is_found_at_once(changes, words):
    with pytest.raises(ConfigError, match=words):
        parts(**changes).check(MODEL, CPU)


def test_modes_take_the_selectors_that_they_read():
    selectors = ["infllm2", "quest", "nosa", "lowbit2"]
    assert selectors_of("exact", selectors) == selectors
    assert selectors_of("forecast", selectors) == ["infllm2", "nosa", "lowbit2"]
    assert selectors_of("forecast", ["lowbit4", "quest"]) == ["lowbit4", "infllm2"]
    assert selectors_of("forecast", selectors, heads=3) == selectors
    assert selectors_of("dense", selectors) == ["infllm2"]
