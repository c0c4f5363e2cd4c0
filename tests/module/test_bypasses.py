"""What would go past an optimized module is refused; what a model knows is handed on."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import BypassError
from sparda_compile.module.bypasses import BYPASSES
from sparda_compile.testing import tiny_llama


@pytest.fixture(scope="module")
def pair():
    model = tiny_llama(num_hidden_layers=1)
    return model, optimize(model, SpardaConfig(mode="query", lowering="eager"))


@pytest.mark.parametrize("name", BYPASSES)
def test_what_goes_past_it_is_refused_with_what_to_do(pair, name):
    _, fast = pair
    with pytest.raises(BypassError, match=rf"has no {name}: .*(optimize|generate|save)"):
        getattr(fast, name)
    assert not hasattr(fast, name)


def test_most_of_them_are_methods_of_transformers():
    known = {name for name in BYPASSES if hasattr(PreTrainedModel, name)}
    assert {"add_adapter", "save_pretrained", "push_to_hub", "set_attn_implementation"} <= known


def test_compiling_it_again_is_refused(pair):
    with pytest.raises(BypassError, match="compile"):
        pair[1].compile()


@pytest.mark.parametrize("name", ["config", "device", "dtype", "main_input_name"])
def test_facts_are_handed_on(pair, name):
    model, fast = pair
    assert getattr(fast, name) == getattr(model, name)


def test_questions_are_handed_on(pair):
    model, fast = pair
    assert fast.can_generate()
    own, theirs = (m.get_input_embeddings().weight for m in (fast, model))
    assert own is theirs
    with pytest.raises(AttributeError):
        _ = fast.no_such_thing
