from __future__ import annotations

import pytest

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.module.captures_of import captures_of
from sparda_compile.testing import tiny_llama


def test_an_optimized_module_keeps_its_traces():
    fast = optimize(tiny_llama(), SpardaConfig(mode="dense"))
    assert captures_of(fast) is fast.captures


def test_a_model_is_not_traced_before_it_has_to_be():
    model = tiny_llama()
    captures = captures_of(model)
    assert captures.num_captures == 0
    assert captures.model_name == "LlamaForCausalLM"
    shared = dict(captures.model.named_parameters())
    assert all(shared[name] is weight for name, weight in model.named_parameters())


@pytest.mark.parametrize(
    ("model", "words"),
    [("llama", ["str", "from_pretrained"]), (tiny_llama().train(), ["training mode", "eval()"])],
    ids=["no module", "in training mode"],
)
def test_what_is_refused_is_named(model, words):
    with pytest.raises(UnsupportedInputError) as caught:
        captures_of(model)
    assert all(word in str(caught.value) for word in words)
