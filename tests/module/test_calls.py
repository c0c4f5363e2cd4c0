from __future__ import annotations

import pytest
from transformers import GenerationConfig

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.module.calls import check_generation


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_beams", 2, "beam search is not supported"),
        ("prompt_lookup_num_tokens", 3, "assisted and prompt-lookup"),
        ("cache_implementation", "static", "cache_implementation='static'"),
    ],
)
def test_refused_by_argument_and_by_config(name, value, words):
    for config, kwargs in (
        (GenerationConfig(), {name: value}),
        (GenerationConfig(**{name: value}), {}),
    ):
        with pytest.raises(UnsupportedInputError, match=words):
            check_generation(config, kwargs)


def test_refused_by_argument():
    for name in ("assistant_model", "inputs_embeds"):
        with pytest.raises(UnsupportedInputError):
            check_generation(GenerationConfig(), {name: object()})


def test_arguments_win():
    check_generation(GenerationConfig(num_beams=4), {"num_beams": 1})
    check_generation(GenerationConfig(), {"do_sample": True, "num_return_sequences": 3})
