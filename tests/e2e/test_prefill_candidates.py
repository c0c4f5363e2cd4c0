"""A prompt's tokens score the low-bit keys of some blocks, which a look at all has proposed."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from sparda_compile import SpardaConfig, explain, optimize
from sparda_compile.testing import reference_decode

SMALL = {
    "mode": "query", "selector": "lowbit2", "block_size": 16, "pool_size": 8, "pool_stride": 4,
    "sink_blocks": 1, "local_blocks": 1, "top_k": 2, "lowering": "eager", "prefill": "sparse",
    "prefill_candidates": 1.5, "machine": "h200",
}  # fmt: skip
RULES = ("mode", "selector", "block_size", "pool_size", "pool_stride", "top_k", "prefill")
MODES = {
    "query": {},
    "exact": {"mode": "exact", "hint": ("ema", "next_query")},
    "speculate": {"mode": "speculate", "offload": "never"},
    "forecast": {"mode": "forecast", "forecast_heads": 2},
}


@pytest.fixture(scope="module")
def make(traced_llama):
    @functools.cache
    def made(mode="query", **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a Forecast that nobody has trained
            return optimize(traced_llama, SpardaConfig(**{**SMALL, **MODES[mode], **settings}))

    return made


def text(*lengths):
    """Return left-padded ids and their mask."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 250, (len(lengths), max(lengths)), generator=generator)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths])
    return ids, mask.long()


def logits_of(fast, ids, mask):
    """Return the logits of a prompt's tokens, and of steps behind it."""
    cache = fast.new_cache(192)
    found = [fast(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()]]
    for step in range(3):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        out = fast(ids[:, step : step + 1], attention_mask=mask, past_key_values=cache)
        found.append(out.logits[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4"])
def test_prompt_and_steps_are_those_of_the_reference(shared_llama, make, selector):
    ids, mask = text(130, 101)
    fast = make(selector=selector)
    out = fast.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    logits = torch.stack(out.logits, dim=1)
    rules = {name: SMALL[name] for name in RULES} | {"selector": selector}
    for row, length in enumerate((130, 101)):
        want, want_logits = reference_decode(
            shared_llama, ids[row, -length:], 5, local_blocks=1, prefill_candidates=1.5, **rules
        )
        assert out.sequences[row, ids.shape[1] :].tolist() == want
        torch.testing.assert_close(logits[row], torch.stack(want_logits), rtol=0, atol=1e-3)
    of_all = make(selector=selector, prefill_candidates=None)
    assert (logits_of(of_all, ids, mask) - logits_of(fast, ids, mask)).abs().max() > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_as_many_candidates_as_blocks_are_all_of_them(make, mode):
    """Bit for bit, and in a longer prompt so are the tokens that have no more blocks than that."""
    ids, mask = text(130, 61)
    want = logits_of(make(mode, prefill_candidates=None), ids, mask)
    assert torch.equal(logits_of(make(mode, prefill_candidates=3.0), ids, mask), want)
    some = make(mode)(ids, attention_mask=mask).logits
    all_of_them = make(mode, prefill_candidates=None)(ids, attention_mask=mask).logits
    assert torch.equal(some[0, : 6 * 16], all_of_them[0, : 6 * 16])
    assert not torch.equal(some[0, 6 * 16 :], all_of_them[0, 6 * 16 :])


@pytest.mark.parametrize("mode", ["exact", "speculate"])
def test_other_modes_read_what_the_query_selects(make, mode):
    ids, mask = text(130, 61)
    got, want = (logits_of(make(name), ids, mask) for name in (mode, "query"))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", [{"chunk_tokens": 7}, {"chunk_tokens": 64}])
def test_chunks_are_one_piece(make, mode, settings):
    ids, mask = text(130, 61)
    got, want = (logits_of(make(mode, **more), ids, mask) for more in (settings, {}))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_turns_are_one_piece(make, mode):
    ids, _ = text(150)
    fast = make(mode)
    whole = fast(ids, past_key_values=fast.new_cache(192)).logits
    cache = fast.new_cache(192)
    turns = [fast(part, past_key_values=cache).logits for part in ids.split((70, 13, 67), dim=1)]
    torch.testing.assert_close(torch.cat(turns, dim=1), whole, rtol=0, atol=1e-4)


def test_runs_of_tokens_share_what_their_first_one_scores(shared_llama, make):
    ids, _ = text(130)
    logits = make(shared_tokens=8)(ids).logits[0, -1]
    rules = {name: SMALL[name] for name in RULES}
    _, want = reference_decode(
        shared_llama, ids, 1, local_blocks=1, prefill_candidates=1.5, shared_tokens=8, **rules
    )
    torch.testing.assert_close(logits, want[0], rtol=0, atol=1e-3)


def test_a_report_names_the_candidates(traced_llama):
    found = str(explain(traced_llama, SpardaConfig(**SMALL), max_tokens=1 << 12))
    assert "They score the keys of 3 + 3 blocks" in found
