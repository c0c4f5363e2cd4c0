from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from sparda_compile import SpardaConfig, optimize
from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.errors import KVCacheError, UnsupportedInputError
from sparda_compile.module.calls import check_generation, check_holes
from sparda_compile.testing import build, tiny_llama


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


class TestHonoured:
    """What transformers accepts does what it does there."""

    @pytest.fixture(scope="class")
    def pair(self):
        model = tiny_llama(num_hidden_layers=1)
        config = SpardaConfig(mode="query", top_k=None, lowering="eager", block_size=16)
        return model, optimize(model, config)

    @staticmethod
    def ids(batch_size=1, num_tokens=30):
        generator = torch.Generator().manual_seed(batch_size)
        return torch.randint(2, 250, (batch_size, num_tokens), generator=generator)

    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize("keep", [0, 1, 2, 30, 99, -2, torch.tensor([0, 7, 29])])
    def test_logits_to_keep(self, pair, batch_size, keep):
        model, fast = pair
        ids = self.ids(batch_size)
        with torch.no_grad():
            want = model(ids, logits_to_keep=keep).logits
        got = fast(ids, logits_to_keep=keep).logits
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_logits_to_keep_of_a_decode(self, pair):
        _, fast = pair
        cache = fast.new_cache()
        fast(self.ids(), past_key_values=cache)
        for keep in (0, 1, 5, torch.tensor([0])):
            logits = fast(self.ids(1, 1), past_key_values=cache, logits_to_keep=keep).logits
            assert logits.shape[:2] == (1, 1)
        with pytest.raises(UnsupportedInputError, match="logits_to_keep has shape"):
            fast(self.ids(), logits_to_keep=torch.ones(2, 2))

    def test_a_tuple_where_one_is_asked_for(self, pair):
        _, fast = pair
        whole = fast(self.ids())
        logits, cache = fast(self.ids(), return_dict=False)
        assert torch.equal(logits, whole.logits)
        assert cache.get_seq_length() == 30
        assert len(fast(self.ids(), return_dict=False, use_cache=False)) == 1

    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize("saved", [False, True])
    def test_use_cache_false_gives_the_same_tokens(self, pair, batch_size, saved):
        model, fast = pair
        ids = self.ids(batch_size)
        ask = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
        want = model.generate(ids, **ask)
        if saved:
            ask["generation_config"] = GenerationConfig(**ask, use_cache=False)
        else:
            ask["use_cache"] = False
        got = fast.generate(ids, **ask)
        assert torch.equal(got.sequences, want.sequences)
        assert getattr(got, CACHE_NAME) is None
        assert fast.last_cache.lengths() == [37] * batch_size
        assert getattr(fast(ids, use_cache=False), CACHE_NAME) is None

    def test_an_assigned_generation_config_is_used(self, pair):
        model, fast = pair
        before = fast.generation_config
        try:
            fast.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False)
            assert fast.generate(self.ids()).shape[1] == 33
            assert model.generation_config.max_new_tokens != 3
        finally:
            fast.generation_config = before

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_positions_of_a_padded_prompt_count_columns(self, name):
        model = build(name)
        fast = optimize(model, SpardaConfig(mode="query", top_k=None, lowering="eager"))
        ids, mask = self.ids(3), torch.ones(3, 30, dtype=torch.long)
        mask[1, :7] = mask[2, :20] = 0
        with torch.no_grad():
            want = model(ids, attention_mask=mask).logits
        got = fast(ids, attention_mask=mask).logits
        for row in range(3):
            real = mask[row].bool()
            torch.testing.assert_close(got[row, real], want[row, real], rtol=1e-3, atol=1e-3)


class TestRefused:
    """What is not honoured is refused, and nothing is lost."""

    @pytest.fixture(scope="class")
    def fast(self):
        config = SpardaConfig(mode="query", top_k=None, lowering="eager", block_size=16)
        return optimize(tiny_llama(num_hidden_layers=1), config)

    ids = staticmethod(TestHonoured.ids)

    @pytest.mark.parametrize("lowest", [-1, 256, 1 << 40])
    @pytest.mark.parametrize("num_tokens", [1, 30])
    def test_ids_outside_the_vocabulary(self, fast, lowest, num_tokens):
        ids = self.ids(2, num_tokens)
        ids[1, -1] = lowest
        with pytest.raises(UnsupportedInputError, match=rf"hold {lowest}.* vocabulary is 0 to 255"):
            fast(ids)

    @pytest.mark.parametrize(
        "ids", [torch.ones(4, dtype=torch.long), torch.ones(0, 4, dtype=torch.long), [[1, 2]], None]
    )
    def test_ids_of_another_form(self, fast, ids):
        with pytest.raises(UnsupportedInputError, match="input_ids has shape"):
            fast(ids)
        with pytest.raises(UnsupportedInputError, match=r"input_ids are torch\.float32"):
            fast(torch.ones(1, 3))

    def test_right_padding_in_generate(self, fast):
        mask = torch.ones(2, 30, dtype=torch.long)
        mask[1, -4:] = 0
        with pytest.raises(UnsupportedInputError, match=r"ends in padding.*padding_side = 'left'"):
            fast.generate(self.ids(2), attention_mask=mask, max_new_tokens=2)

    @pytest.mark.parametrize("num_new", [1, 5])
    def test_a_mask_that_changes_the_past(self, fast, num_new):
        cache, ids = fast.new_cache(), self.ids(2, 60)
        first = torch.ones(2, 50, dtype=torch.long)
        first[1, :3] = 0
        fast(ids[:, :50], attention_mask=first, past_key_values=cache)
        more = torch.nn.functional.pad(first, (0, num_new), value=1)
        for column, value in ((10, 0), (1, 1)):
            wrong = more.clone()
            wrong[1, column] = value
            with pytest.raises(UnsupportedInputError, match=r"changes what columns 0 to 49 were"):
                fast(ids[:, 50 : 50 + num_new], attention_mask=wrong, past_key_values=cache)
        assert cache.get_seq_length() == 50
        fast(ids[:, 50 : 50 + num_new], attention_mask=more, past_key_values=cache)

    def test_a_conversation_whose_past_was_edited(self, fast):
        cache, ids = fast.new_cache(), self.ids(2, 40)
        told = fast.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
        talk = torch.cat([told, self.ids(2, 4)], dim=1)
        edited = talk.clone()
        edited[1, 20] = 2 + (edited[1, 20] + 1) % 200
        with pytest.raises(KVCacheError, match="first at token 20 of sequence 1"):
            fast.generate(edited, past_key_values=cache, max_new_tokens=2)
        again = fast.generate(talk, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert torch.equal(again, fast.generate(talk, max_new_tokens=5, do_sample=False))

    def test_many_turns_are_remembered_in_few_parts(self, fast):
        cache = fast.new_cache(max_tokens=2048)
        ids = self.ids(1, 600)
        for place in range(600):
            fast(ids[:, place : place + 1], past_key_values=cache)
        assert len(cache._passed) < 300
        cache.check_ids(ids)
        wrong = ids.clone()
        wrong[0, 3] += 1
        with pytest.raises(KVCacheError, match="first at token 3"):
            cache.check_ids(wrong)

    def test_a_hidden_prompt_of_one_token(self, fast):
        mask = torch.tensor([[1], [0]])
        with pytest.raises(UnsupportedInputError, match="ends in padding"):
            fast.generate(self.ids(2, 1), attention_mask=mask, max_new_tokens=2)

    def test_what_is_remembered_keeps_no_text_alive(self, fast):
        cache = fast.new_cache()
        fast.generate(self.ids(1, 200), past_key_values=cache, max_new_tokens=9, do_sample=False)
        sizes = [ids.untyped_storage().nbytes() for ids, _ in cache._passed]
        assert sizes == [200 * 8] + [8] * 8


def test_holes_are_refused_where_a_window_would_count_them() -> None:
    holes = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    around = torch.tensor([[0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    with pytest.raises(UnsupportedInputError, match="sliding window of 4 tokens"):
        check_holes(holes, (0, 8, 4))
    for mask, windows in ((holes, (0, 0)), (holes, (6,)), (around, (4,)), (None, (4,))):
        check_holes(mask, windows)
