"""A cache that another module of the same model takes over, as if it had read the text itself."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import KVCacheError
from sparda_compile.runtime.held import HeldKeysValues
from sparda_compile.testing import build, tiny_llama

BASE = SpardaConfig(
    mode="query", top_k=2, local_blocks=1, block_size=16, lowering="eager", prefill="dense"
)
PADDING = (50, 3, 0)


@pytest.fixture(scope="module")
def prompt(shared_llama):
    """Ragged tokens, padded on the left, and their mask."""
    ids = torch.randint(1, shared_llama.config.vocab_size, (3, 203))
    mask = torch.ones_like(ids)
    for row, padding in enumerate(PADDING):
        mask[row, :padding] = 0
    return ids, mask


@pytest.fixture(scope="module")
def fast(traced_llama):
    return optimize(traced_llama, BASE)


def read(module, ids, mask):
    """Read tokens, but for the last three, as one prompt and those step by step."""
    cache = module.new_cache(ids.shape[1] + 5)
    module(ids[:, :-3], attention_mask=mask[:, :-3], past_key_values=cache)
    for n in (2, 1, 0):
        end = ids.shape[1] - n
        module(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
    return cache


def filled(cache):
    """Return keys and values by layer, and which are of real tokens, [B, T]."""
    mask = cache.passed_mask
    return HeldKeysValues(cache.kv, mask), mask


def assert_same(cache, other, atol=0.0):
    (ours, mask), (theirs, other_mask) = filled(cache), filled(other)
    assert torch.equal(mask, other_mask)
    assert list(ours) == list(theirs)
    assert len(ours) == len(theirs) > 0
    for layer in ours:
        for one, two in zip(ours[layer], theirs[layer], strict=True):
            assert one.shape[2] == two.shape[2]
            real = mask[:, mask.shape[1] - one.shape[2] :, None, None]
            rows = (x.transpose(1, 2).masked_fill(~real, 0) for x in (one, two))
            torch.testing.assert_close(*rows, rtol=0, atol=atol)


@pytest.mark.parametrize("offload", ["always", "never"])
@pytest.mark.parametrize("mode", ["dense", "exact", "speculate"])
@pytest.mark.filterwarnings("ignore:mode='speculate' speculates in no layer")
def test_every_mode_takes_over_and_hands_over_the_same_bits(fast, prompt, mode, offload):
    if (mode, offload) == ("speculate", "always"):
        offload = "auto"
    other = optimize(fast, BASE.replace(mode=mode, offload=offload, hint="ema"))
    first = read(fast, *prompt)
    taken = other.new_cache(300, past=first)
    assert taken.kv.lengths() == first.kv.lengths() == [203 - padding for padding in PADDING]
    assert taken.get_seq_length() == 203
    assert taken.has_padding
    assert_same(first, taken)
    assert_same(first, fast.new_cache(past=taken))


@pytest.mark.parametrize(
    ("kv_format", "changes"),
    [
        *((name, {}) for name in ("int8", "int4", "values8")),
        ("int8", {"page_format": "stored"}),
        ("int4", {"page_format": "stored", "offload": "never"}),
    ],
)
def test_blocks_that_were_rounded_stay_what_they_are(fast, prompt, kv_format, changes):
    rounds = optimize(fast, BASE.replace(kv_format=kv_format, **changes))
    first = read(rounds, *prompt)
    plain = fast.new_cache(past=first)
    assert_same(first, plain)
    # Rounding what is rounded changes nothing, but for keys that stay, by what float32 rounds.
    assert_same(first, rounds.new_cache(past=plain), atol=1e-5 if kv_format == "values8" else 0.0)


def test_a_step_goes_on_as_if_nothing_had_happened(fast, prompt):
    ids, mask = prompt
    resident = optimize(fast, BASE.replace(offload="never", selector="quest"))
    first = read(fast, ids, mask)
    back = fast.new_cache(past=resident.new_cache(past=first))
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    one, two = (
        fast(ids[:, :1], attention_mask=mask, past_key_values=cache).logits
        for cache in (first, back)
    )
    # Pooled keys are added up one by one in steps, and all at once here.
    torch.testing.assert_close(one, two)


def test_windows_hand_over_their_last_tokens():
    model = build("gemma3")
    module = optimize(model, BASE.replace(top_k=None))
    ids = torch.randint(1, model.config.vocab_size, (2, 90))
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    first = read(module, ids, mask)
    other = optimize(module, BASE.replace(mode="dense"))
    taken = other.new_cache(past=first)
    held, _ = filled(first)
    assert {held[layer][0].shape[2] < 90 for layer in held} == {True, False}
    assert_same(first, taken)
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    torch.testing.assert_close(
        module(ids[:, :1], attention_mask=mask, past_key_values=first).logits,
        other(ids[:, :1], attention_mask=mask, past_key_values=taken).logits,
    )


def test_tokens_that_are_taken_over_are_known(fast):
    ids = torch.randint(1, 256, (1, 40))
    cache = fast.new_cache()
    fast(ids, past_key_values=cache)
    taken = optimize(fast, BASE.replace(mode="dense")).new_cache(past=cache)
    other = ids.clone()
    other[0, 7] += 1
    with pytest.raises(KVCacheError, match="first at token 7 of sequence 0"):
        taken.check_ids(other)
    taken.check_ids(ids)


def test_what_cannot_be_taken_over_is_refused(fast, shared_llama):
    cache = fast.new_cache()
    with pytest.raises(KVCacheError, match="past holds no token"):
        fast.new_cache(past=cache)
    fast(torch.ones(1, 20, dtype=torch.long), past_key_values=cache)
    with pytest.raises(KVCacheError, match="knows which of its tokens are padding"):
        fast.new_cache(past=cache, attention_mask=torch.ones(1, 20))
    stranger = optimize(tiny_llama(), BASE)
    with pytest.raises(KVCacheError, match="past is a cache of another model"):
        stranger.new_cache(past=cache)
    cache.kv.is_broken = True
    with pytest.raises(KVCacheError, match="began and did not end"):
        fast.new_cache(past=cache)
