"""An optimized module takes the cache by either name that transformers has given it."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparda_compile import SpardaConfig, optimize
from sparda_compile.capture.cache_name import CACHE_NAME, cache_of, output_with_cache, take_cache
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.testing import tiny_llama


def test_name_is_that_of_the_installed_transformers():
    out = CausalLMOutputWithPast(**{CACHE_NAME: "kept"})
    assert out[CACHE_NAME] == cache_of(out) == "kept"


def test_output_keeps_logits_and_cache():
    out = output_with_cache(torch.ones(2), "kept")
    assert torch.equal(out.logits, torch.ones(2))
    assert cache_of(out) == "kept"


def test_cache_is_taken_by_either_name():
    kwargs = {"past_key_values": 1, "other": 2}
    assert take_cache(kwargs) == 1
    assert take_cache({"cache": 3, "past_key_values": None}) == 3
    assert take_cache(kwargs) is None
    assert kwargs == {"other": 2}


def test_both_names_at_once_are_refused():
    with pytest.raises(UnsupportedInputError, match="two names of one argument"):
        take_cache({"past_key_values": 1, "cache": 2})


def test_module_goes_on_with_a_cache_by_either_name():
    config = SpardaConfig(mode="query", block_size=16, top_k=2, local_blocks=1, lowering="eager")
    fast = optimize(tiny_llama(), config)
    ids = torch.randint(1, 250, (1, 90))
    whole = fast.generate(ids, max_new_tokens=6, do_sample=False)
    for name in ("cache", "past_key_values"):
        kept = fast.new_cache()
        fast(ids[:, :60], **{name: kept})
        assert torch.equal(
            fast.generate(ids, max_new_tokens=6, do_sample=False, **{name: kept}), whole
        )
