"""The optimized module keeps the contract of the model's own `forward` and `generate`.

Every block is selected here (`top_k=None`), so the outputs are those of the model itself.
"""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sparda_compile import SpardaConfig, optimize
from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.testing import tiny_llama

CONFIG = SpardaConfig(mode="query", top_k=None, block_size=16, lowering="eager")
MODES = {
    "dense": {"mode": "dense"},
    "query": {"mode": "query"},
    "quest": {"mode": "query", "selector": "quest"},
    "lowbit2": {"mode": "query", "selector": "lowbit2"},
    "exact": {"mode": "exact", "hint": "previous_step"},
    "resident": {"mode": "query", "offload": "never"},
}


def prompt(num_tokens, batch_size=1, seed=0):
    generator = torch.Generator().manual_seed(100 * num_tokens + seed)
    return torch.randint(256, (batch_size, num_tokens), generator=generator)


def ragged(*lengths):
    """Return left-padded tokens and their mask."""
    ids = prompt(max(lengths), len(lengths))
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()
    return ids * mask, mask


@pytest.fixture(scope="module")
def model(shared_llama):
    return shared_llama


@pytest.fixture(scope="module")
def fast(traced_llama):
    return optimize(traced_llama, CONFIG)


@pytest.fixture(scope="module")
def module_of(fast):
    """Return a function that gives the module of a mode and a capacity, built once."""
    return functools.cache(
        lambda mode, max_tokens=None: optimize(
            fast, CONFIG.replace(max_tokens=max_tokens, **MODES[mode])
        )
    )


@pytest.fixture(scope="module")
def other_pair():
    """Another model, with another number of KV heads, and its optimized module."""
    other = tiny_llama(seed=1, num_key_value_heads=4)
    return other, optimize(other, CONFIG)


def greedy(module, ids, num_new=8, **kwargs):
    return module.generate(ids, max_new_tokens=num_new, do_sample=False, **kwargs)


class TestGenerate:
    @pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 100])
    def test_greedy(self, fast, model, length):
        assert torch.equal(greedy(fast, prompt(length)), greedy(model, prompt(length)))

    @pytest.mark.parametrize("mode", MODES)
    def test_every_mode(self, module_of, model, mode):
        module = module_of(mode)
        ids, mask = ragged(37, 20)
        expected = greedy(model, ids, attention_mask=mask)
        assert torch.equal(greedy(module, ids, attention_mask=mask), expected)

    def test_sampling_with_a_seed(self, fast, model):
        outputs = []
        for module in (model, fast):
            torch.manual_seed(7)
            sampling = {"do_sample": True, "temperature": 0.8, "top_k": 50, "max_new_tokens": 12}
            outputs.append(module.generate(prompt(30), **sampling))
        assert torch.equal(*outputs)
        assert not torch.equal(outputs[0], greedy(model, prompt(30), 12))

    def test_ragged_batch(self, fast, model):
        ids, mask = ragged(40, 3, 17)
        expected = greedy(model, ids, attention_mask=mask)
        assert torch.equal(greedy(fast, ids, attention_mask=mask), expected)

    def test_ragged_row_is_as_if_it_were_alone(self, fast):
        ids, mask = ragged(40, 17)
        together = greedy(fast, ids, attention_mask=mask)[1, 40:]
        assert torch.equal(greedy(fast, ids[1:, 23:])[0, 17:], together)

    def test_several_return_sequences(self, fast, model):
        outputs = []
        for module in (model, fast):
            torch.manual_seed(3)
            outputs.append(
                module.generate(
                    prompt(20), do_sample=True, num_return_sequences=3, max_new_tokens=6
                )
            )
        assert outputs[0].shape == (3, 26)
        assert torch.equal(*outputs)

    def test_streamer_gets_the_tokens_as_they_come(self, fast, model):
        class Collector(BaseStreamer):
            def __init__(self):
                self.pieces, self.ended = [], False

            def put(self, value):
                self.pieces.append(value.flatten())

            def end(self):
                self.ended = True

        streamer = Collector()
        tokens = greedy(fast, prompt(20), streamer=streamer)
        assert streamer.ended
        assert [len(piece) for piece in streamer.pieces] == [20] + 8 * [1]
        assert torch.equal(torch.cat(streamer.pieces), tokens[0])

    def test_stopping_criteria(self, fast, model):
        class AtLength(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                return torch.full((len(input_ids),), input_ids.shape[1] >= 25)

        criteria = StoppingCriteriaList([AtLength()])
        tokens = greedy(fast, prompt(20), 30, stopping_criteria=criteria)
        assert torch.equal(tokens, greedy(model, prompt(20), 5))

    def test_end_of_sequence(self, fast, model):
        expected = greedy(model, prompt(20), 12)
        end = int(expected[0, 24])
        stop = {"eos_token_id": end, "pad_token_id": 0}
        stopped = greedy(model, prompt(20), 12, **stop)
        assert stopped.shape[1] < 32
        assert torch.equal(greedy(fast, prompt(20), 12, **stop), stopped)

    def test_rows_that_end_at_different_times(self, fast, model):
        ids, mask = ragged(20, 11)
        expected = greedy(model, ids, 12, attention_mask=mask)
        stop = {"eos_token_id": int(expected[0, 23]), "pad_token_id": 0, "attention_mask": mask}
        assert torch.equal(greedy(fast, ids, 12, **stop), greedy(model, ids, 12, **stop))

    def test_scores_and_dictionary(self, fast, model):
        asked = {"return_dict_in_generate": True, "output_logits": True}
        ours, theirs = (greedy(m, prompt(20), **asked) for m in (fast, model))
        assert torch.equal(ours.sequences, theirs.sequences)
        assert len(ours.logits) == 8
        for mine, his in zip(ours.logits, theirs.logits, strict=True):
            assert_close(mine, his, rtol=1e-4, atol=1e-4)

    def test_defaults_of_the_generation_config(self, fast, model):
        assert fast.generation_config.to_dict() == model.generation_config.to_dict()
        tokens = fast.generate(input_ids=prompt(12), max_length=19, do_sample=False)
        assert torch.equal(tokens, greedy(model, prompt(12), 7))


class TestSecondTurn:
    def conversation(self, module, first, more, **kwargs):
        """Generate, append `more` to the answer and generate again on the same cache."""
        begun = greedy(module, first, return_dict_in_generate=True, **kwargs)
        whole = torch.cat([begun.sequences, more], dim=1)
        return whole, greedy(module, whole, past_key_values=begun.past_key_values)

    @pytest.mark.parametrize("mode", ["query", "exact", "resident"])
    @pytest.mark.parametrize(("first", "more"), [(20, 1), (20, 50), (64, 16), (5, 130)])
    def test_equals_the_whole_conversation_at_once(self, module_of, model, first, more, mode):
        module = module_of(mode, 256)
        whole, answer = self.conversation(module, prompt(first), prompt(more))
        assert torch.equal(answer, greedy(model, whole))
        assert torch.equal(answer, greedy(module, whole))

    def test_of_a_batch(self, module_of, model):
        module = module_of("query", 128)
        whole, answer = self.conversation(module, prompt(20, 2), prompt(33, 2))
        assert torch.equal(answer, greedy(model, whole))

    def test_of_a_ragged_batch(self, module_of, model):
        module = module_of("query", 128)
        ids, mask = ragged(30, 12)
        begun = greedy(module, ids, attention_mask=mask, return_dict_in_generate=True)
        whole = torch.cat([begun.sequences, prompt(21, 2)], dim=1)
        mask = torch.cat([mask, torch.ones(2, 8 + 21).long()], dim=1)
        cache = begun.past_key_values
        answer = greedy(module, whole, attention_mask=mask, past_key_values=cache)
        assert torch.equal(answer, greedy(model, whole, attention_mask=mask))

    def test_grows_beyond_what_was_reserved(self, fast, model):
        whole, answer = self.conversation(fast, prompt(30), prompt(600))
        assert torch.equal(answer, greedy(model, whole))

    def test_grows_in_the_middle_of_a_decode(self, fast, model):
        cache = fast.new_cache(512)
        theirs = DynamicCache(config=model.config)
        ids = prompt(511)
        for _ in range(3):
            ours = fast(ids, past_key_values=cache).logits[:, -1]
            expected = model(ids, **{CACHE_NAME: theirs}).logits[:, -1]
            assert_close(ours, expected, rtol=1e-4, atol=1e-4)
            ids = expected.argmax(-1, keepdim=True)
        assert cache.get_seq_length() == 513
        assert cache.get_max_cache_shape() == 1024

    def test_empty_cache_is_kept_by_the_caller(self, fast, model):
        cache = fast.new_cache(64)
        assert (cache.get_seq_length(), len(cache)) == (0, 0)
        assert torch.equal(
            greedy(fast, prompt(20), past_key_values=cache), greedy(model, prompt(20))
        )
        assert (cache.get_seq_length(), len(cache)) == (27, 2)


class TestForward:
    @pytest.mark.parametrize("length", [1, 2, 16, 31, 96])
    def test_logits(self, fast, model, length):
        ids = prompt(length, 2)
        assert_close(fast(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kept", [0, 1, 3, 20])
    def test_logits_to_keep(self, fast, model, kept):
        ids = prompt(20)
        ours = fast(ids, logits_to_keep=kept).logits
        expected = model(ids, logits_to_keep=kept).logits
        assert ours.shape == expected.shape == (1, kept or 20, 256)
        assert_close(ours, expected, rtol=1e-4, atol=1e-4)

    def test_position_ids(self, fast, model):
        ids = prompt(20)
        positions = torch.arange(20)[None] * 2 + 5
        ours = fast(ids, position_ids=positions).logits
        expected = model(ids, position_ids=positions).logits
        assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, model(ids).logits, atol=1e-2)

    def test_positions_of_one_row_serve_all(self, fast, model):
        ids = prompt(20, 3)
        positions = torch.arange(20)[None] + 4
        expected = model(ids, position_ids=positions).logits
        assert_close(fast(ids, position_ids=positions).logits, expected, rtol=1e-4, atol=1e-4)

    def test_padding_does_not_matter(self, fast):
        ids, mask = ragged(20, 9)
        ours = fast(ids, attention_mask=mask).logits[1, 11:]
        assert_close(ours, fast(ids[1:, 11:]).logits[0], rtol=1e-4, atol=1e-4)

    def test_chunks_equal_the_whole(self, fast, model):
        ids = prompt(90)
        cache, logits = fast.new_cache(128), []
        for chunk in ids.split([1, 30, 16, 2, 41], dim=1):
            out = fast(chunk, past_key_values=cache)
            assert out.past_key_values is cache
            logits.append(out.logits)
        assert_close(torch.cat(logits, dim=1), model(ids).logits, rtol=1e-4, atol=1e-4)

    def test_cache_that_nobody_holds_is_reused(self, fast):
        first = fast(prompt(20)).past_key_values
        state = first.kv.state
        pages = state["sparda_pages_0"].data_ptr()
        del first, state
        gc.collect()
        again = fast(prompt(20)).past_key_values
        assert again.kv.state["sparda_pages_0"].data_ptr() == pages
        assert fast(prompt(20)).past_key_values.kv.state["sparda_pages_0"].data_ptr() != pages


class TestTwoModels:
    def test_interleaved(self, fast, model, other_pair):
        other_model, other = other_pair
        assert greedy(fast, prompt(20)).tolist() != greedy(other, prompt(20)).tolist()
        caches = {fast: fast.new_cache(64), other: other.new_cache(64)}
        theirs = {m: DynamicCache(config=m.config) for m in (model, other_model)}
        ids = prompt(20)
        for _ in range(4):
            for ours, original in ((fast, model), (other, other_model)):
                logits = ours(ids, past_key_values=caches[ours]).logits
                expected = original(ids, **{CACHE_NAME: theirs[original]}).logits
                assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            ids = expected[:, -1].argmax(-1, keepdim=True)

    def test_two_conversations_of_one_module(self, fast, model):
        caches = [fast.new_cache(64), fast.new_cache(64)]
        for length in (20, 1, 7):
            for seed, cache in enumerate(caches):
                fast(prompt(length, seed=seed), past_key_values=cache)
        for seed, cache in enumerate(caches):
            ids = torch.cat([prompt(n, seed=seed) for n in (20, 1, 7, 1)], dim=1)
            last = fast(ids[:, -1:], past_key_values=cache).logits
            assert_close(last, model(ids).logits[:, -1:], rtol=1e-4, atol=1e-4)
