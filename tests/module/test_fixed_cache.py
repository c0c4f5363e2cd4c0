"""`FixedCache`: what transformers' own cache would do to layers that are not there."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers.cache_utils import Cache

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import KVCacheError, UnsupportedInputError
from sparda_compile.module.cache import SpardaCache
from sparda_compile.module.fixed_cache import FixedCache

# They ask for what a cache without layers is: no layer slides, is linear or records its past.
HARMLESS = {"is_sliding", "is_dummy", "is_recording_past", "get_query_offset"}
# No layer has a recurrent state or an indexer of its own; each raises an error for lack of it.
OF_OTHER_LAYERS = {
    "get_conv_state", "get_recurrent_state", "has_previous_state",
    "update_conv_state", "update_indexer", "update_recurrent_state",
}  # fmt: skip


@pytest.fixture(scope="module")
def fast(traced_llama):
    config = SpardaConfig(mode="query", top_k=None, block_size=16, lowering="eager")
    return optimize(traced_llama, config)


def test_nothing_of_transformers_acts_on_layers_that_are_not_there():
    inherited = {name for name in vars(Cache) if not name.startswith("_")}
    own = vars(SpardaCache).keys() | vars(FixedCache).keys()
    assert inherited - own - HARMLESS - OF_OTHER_LAYERS == set()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda c: c.crop(3),
            "crop is not supported: what was written to blocks is not taken back; call reset",
        ),
        (lambda c: c.activate_past_recording(), "activate_past_recording is not supported"),
        (lambda c: c.batch_repeat_interleave(2), "batch size of a cache is fixed"),
        (lambda c: c.batch_select_indices(torch.tensor([1, 0])), "batch size of a cache is fixed"),
        (lambda c: c.early_initialization(1, 2, 16), r"reserved by new_cache\(max_tokens\)"),
        (lambda c: c.offload(0), "part of the module's programs"),
        (lambda c: c.prefetch(0), "part of the module's programs"),
        (pickle.dumps, "cannot be pickled.* use copy.deepcopy, or cache.save"),
        (copy.copy, "cannot be pickled, or copied by copy.copy"),
    ],
)
def test_what_would_change_or_share_its_memory_is_refused(fast, call, words):
    cache = fast.new_cache(64)
    fast(torch.zeros(2, 9, dtype=torch.long), past_key_values=cache)
    with pytest.raises(UnsupportedInputError, match=words):
        call(cache)
    assert cache.get_seq_length() == 9


def test_a_model_that_is_not_optimized_cannot_write_to_it(fast):
    with pytest.raises(KVCacheError, match="to a model that is not optimized"):
        fast.new_cache(64).update(None, None, 0)


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([0]),
        torch.tensor([0, 1, 0]),
        torch.tensor([2, 0]),
        torch.tensor([-1, 0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        torch.tensor([[0, 1]]),
        [1, 0],
    ],
)
def test_sequences_that_are_not_there_are_no_reason_to_break_a_cache(fast, rows):
    cache = fast.new_cache(64)
    ids = torch.arange(18).view(2, 9)
    fast(ids, past_key_values=cache)
    with pytest.raises(KVCacheError, match="and the cache holds 2 sequences; pass a tensor"):
        cache.reorder_cache(rows)
    assert cache.passed_mask.shape == (2, 9)
    again = fast.new_cache(64)
    fast(ids, past_key_values=again)
    step = torch.tensor([[3], [4]])
    found, want = (fast(step, past_key_values=each).logits for each in (cache, again))
    assert torch.equal(found, want)
