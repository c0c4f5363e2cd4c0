"""A cache that the model filled itself, taken over: as if the optimized module had read it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import KVCacheError
from sparda_compile.module.given_cache import keys_and_values
from sparda_compile.runtime.take_over import take_over
from sparda_compile.testing import build, tiny_llama

BASE = SpardaConfig(
    mode="query", top_k=2, local_blocks=1, block_size=16, max_tokens=256, lowering="eager"
)
COLUMNS = 203
PADDING = (50, 3, 0)


@pytest.fixture(scope="module")
def model(shared_llama):
    return shared_llama


@pytest.fixture(scope="module")
def fast(traced_llama):
    return optimize(traced_llama, BASE)


@pytest.fixture(scope="module")
def prompt(model):
    """Ragged tokens, padded on the left, and their mask."""
    ids = torch.randint(1, model.config.vocab_size, (3, COLUMNS))
    mask = torch.ones_like(ids)
    for row, padding in enumerate(PADDING):
        mask[row, :padding] = 0
    return ids, mask


@torch.no_grad()
def positions_of(mask):
    """Return positions as `generate` counts them: real tokens alone."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def check_steps(module, taken, read, ids, mask):
    """Check that two caches go on alike, token by token."""
    for token in ids.split(1, dim=1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        one, other = (
            module(token, attention_mask=mask, past_key_values=cache).logits
            for cache in (taken, read)
        )
        torch.testing.assert_close(one, other)


def fill(model, ids, mask):
    return model(ids, attention_mask=mask, position_ids=positions_of(mask)).past_key_values


@pytest.fixture(scope="module")
def past(model, prompt):
    return fill(model, *prompt)


@pytest.mark.parametrize("offload", ["always", "never"])
@pytest.mark.parametrize("mode", ["dense", "query", "forecast", "exact"])
@pytest.mark.filterwarnings("ignore:Forecast weights")
def test_cache_is_what_a_prefill_leaves(model, fast, prompt, past, mode, offload):
    module = optimize(fast, BASE.replace(mode=mode, offload=offload))
    ids, mask = prompt
    taken = module.new_cache(past=past, attention_mask=mask)
    read = module(ids, attention_mask=mask, position_ids=positions_of(mask)).past_key_values
    assert taken.kv.lengths() == [COLUMNS - padding for padding in PADDING]
    assert taken.get_seq_length() == COLUMNS
    assert taken.kv.longest == read.kv.longest
    assert module.sparda.stats() == taken.kv.stats() == read.kv.stats()
    names = taken.kv.state | taken.kv.host_blocks
    for name in names:
        ours = (taken.kv.state | taken.kv.host_blocks)[name]
        torch.testing.assert_close(ours, (read.kv.state | read.kv.host_blocks)[name])
    check_steps(module, taken, read, ids[:, -3:], mask)


@pytest.mark.parametrize("selector", ["quest", "lowbit2"])
def test_summaries_of_other_selectors_are_made(fast, prompt, past, selector):
    module = optimize(fast, BASE.replace(mode="query", selector=selector))
    ids, mask = prompt
    taken = module.new_cache(past=past, attention_mask=mask)
    read = module(ids, attention_mask=mask, position_ids=positions_of(mask)).past_key_values
    check_steps(module, taken, read, ids[:, -3:], mask)


@pytest.fixture(scope="module")
def windowed():
    """A model whose layers have sliding windows of less than 90 tokens, and the same optimized."""
    model = build("gemma3")
    return model, optimize(model, BASE.replace(top_k=None))


def test_windows_keep_their_last_tokens(windowed):
    model, module = windowed
    ids = torch.randint(1, model.config.vocab_size, (2, 90))
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    past = fill(model, ids, mask)
    assert any(layer.keys.shape[2] < 90 for layer in past.layers)
    taken = module.new_cache(past=past, attention_mask=mask)
    read = module(ids, attention_mask=mask, position_ids=positions_of(mask)).past_key_values
    check_steps(module, taken, read, ids[:, :40], mask)


def test_windows_refuse_padding_behind_tokens(windowed):
    model, module = windowed
    ids = torch.randint(1, model.config.vocab_size, (1, 90))
    mask = torch.ones_like(ids)
    past = fill(model, ids, mask)
    mask[0, -1] = 0
    with pytest.raises(KVCacheError, match="padding on the left"):
        module.new_cache(past=past, attention_mask=mask)


def test_generate_goes_on_from_it(model, fast, prompt):
    ids = prompt[0][2:]
    past = fill(model, ids[:, :-1], torch.ones_like(ids[:, :-1]))
    module = optimize(fast, BASE.replace(top_k=None))
    ours = module.generate(ids, past_key_values=module.new_cache(past=past), max_new_tokens=8)
    assert torch.equal(ours, model.generate(ids, do_sample=False, max_new_tokens=8))


def test_other_kinds_of_cache_are_refused(fast):
    with pytest.raises(KVCacheError, match="past holds no token"):
        fast.new_cache(past=fast.new_cache())
    with pytest.raises(KVCacheError, match="holds no token"):
        fast.new_cache(past=DynamicCache())


def test_mask_of_another_size_is_refused(fast, past, prompt):
    with pytest.raises(KVCacheError, match=r"shape \(3, 202\) but past holds \(3, 203\)"):
        fast.new_cache(past=past, attention_mask=prompt[1][:, 1:])


def test_other_model_is_refused(fast):
    other = tiny_llama(num_hidden_layers=3)
    past = fill(other, torch.ones(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(KVCacheError, match="holds 3 layers but the model has 2"):
        fast.new_cache(past=past)


def test_other_shape_or_dtype_is_refused(fast, past, prompt):
    module = fast.new_cache(past=past, attention_mask=prompt[1])
    keys_values, mask = keys_and_values(past, prompt[1])
    wrong = {layer: (k.half(), v.half()) for layer, (k, v) in keys_values.items()}
    with pytest.raises(KVCacheError, match="float16 for layer 0"):
        take_over(module.kv, wrong, mask)
    wrong = {layer: (k, v[:, :, 1:]) for layer, (k, v) in keys_values.items()}
    with pytest.raises(KVCacheError, match=r"\(3, 2, 202, \d+\) of torch.float32 for layer 0"):
        take_over(module.kv, wrong, mask)


def test_too_long_is_refused_and_nothing_is_lost(model, fast):
    ids = torch.ones(1, 256, dtype=torch.long)
    past = fill(model, ids, ids)
    with pytest.raises(KVCacheError, match="257 tokens"):
        fast.new_cache(past=past)
    grown = optimize(fast, dataclasses.replace(BASE, max_tokens=None))
    assert grown.new_cache(400, past=past).get_max_cache_shape() == 512
    assert past.get_seq_length() == 256
