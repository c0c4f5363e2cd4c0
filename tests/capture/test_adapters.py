from __future__ import annotations

from typing import Any

import peft
import pytest

from sparda_compile.capture.adapters import check_adapters, without_wrapper
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.testing import tiny_llama


def wrapped() -> Any:
    return peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )


def test_wrapper_is_left_out_and_other_models_stay() -> None:
    model, plain = wrapped(), tiny_llama()
    assert without_wrapper(model) is model.base_model.model
    assert without_wrapper(plain) is plain


def test_own_generation_config_of_a_wrapper_goes_with_a_copy() -> None:
    model = wrapped()
    inner = model.get_base_model()
    model.generation_config = type(inner.generation_config)(max_new_tokens=3)
    got: Any = without_wrapper(model)
    assert got is not inner
    assert got.generation_config.max_new_tokens == 3
    assert got.model is inner.model
    assert inner.generation_config.max_new_tokens != 3


def test_merged_and_disabled_is_refused_and_each_alone_is_not() -> None:
    model = wrapped().eval()
    with model.disable_adapter():
        check_adapters(model.get_base_model())
    model.merge_adapter()
    check_adapters(model.get_base_model())
    with (
        model.disable_adapter(),
        pytest.raises(UnsupportedInputError, match=r"q_proj has a merged adapter"),
    ):
        check_adapters(model.get_base_model())
