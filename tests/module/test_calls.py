from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from sparda_compile import SpardaConfig, optimize
from sparda_compile.capture.cache_name import CACHE_NAME, cache_of
from sparda_compile.errors import KVCacheError, UnsupportedInputError
from sparda_compile.module.arguments import FORWARD
from sparda_compile.module.calls import check_generation, length_of
from sparda_compile.testing import build, tiny_llama

DENSE = SpardaConfig(mode="query", top_k=None, lowering="eager", block_size=16)


class TestSettings:
    """What holds for a call of `generate`."""

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("num_beam_groups", 2, "from the Hub"),
            ("prompt_lookup_num_tokens", 3, "assisted and prompt-lookup"),
            ("cache_implementation", "static", "cache_implementation='static'"),
        ],
    )
    def test_refused_wherever_it_is_set(self, name, value, words):
        plain, asking = GenerationConfig(), GenerationConfig(**{name: value})
        for saved, kwargs in (
            (plain, {name: value}),
            (asking, {}),
            (plain, {"generation_config": asking}),
            (asking, {"generation_config": plain}),
        ):
            with pytest.raises(UnsupportedInputError, match=words):
                check_generation(saved, kwargs)

    def test_the_nearest_wins(self):
        saved = GenerationConfig(num_beam_groups=4, max_new_tokens=9, top_k=3)
        given = GenerationConfig(num_beam_groups=1, top_k=4)
        values = check_generation(saved, {"generation_config": given, "top_k": 5})
        assert [values[n] for n in ("num_beam_groups", "max_new_tokens", "top_k")] == [1, 9, 5]
        assert "generation_config" not in values
        with pytest.raises(UnsupportedInputError, match="num_beam_groups=4"):
            check_generation(saved, {})
        check_generation(saved, {"num_beam_groups": None})

    def test_another_form_of_config(self):
        with pytest.raises(UnsupportedInputError, match="generation_config is a dict"):
            check_generation(GenerationConfig(), {"generation_config": {"top_k": 3}})

    @pytest.mark.parametrize(
        ("settings", "limit", "total"),
        [
            ({}, None, 50), ({}, 40, 40), ({}, 20, 30), ({"max_length": 33}, 20, 33),
            ({"max_length": 33, "max_new_tokens": 5}, 20, 35),
        ],
    )  # fmt: skip
    def test_length(self, settings, limit, total):
        config = SimpleNamespace(max_position_embeddings=limit)
        assert length_of(30, settings, config) == total


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
        length = cache.get_seq_length()
        with pytest.raises(UnsupportedInputError, match=r"holds 1, and this call passes 1 token"):
            fast(self.ids(1, 1), past_key_values=cache, logits_to_keep=torch.tensor([1]))
        assert cache.get_seq_length() == length

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
        assert list(got.keys()) == list(model.generate(ids, **ask).keys())
        assert len(got.to_tuple()) == 1
        assert fast.last_cache.lengths() == [37] * batch_size
        assert getattr(fast(ids, use_cache=False), CACHE_NAME) is None

    def test_the_last_cache_is_that_of_the_text(self, pair):
        _, fast = pair
        fast.generate(self.ids(), guidance_scale=2.0, max_new_tokens=3)
        assert fast.last_cache.lengths() == [32]

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
        for call in (fast, fast.generate):
            if ids is not None or call is fast:
                with pytest.raises(UnsupportedInputError, match=r"input_ids (has shape|is a)"):
                    call(ids)
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

    @pytest.mark.parametrize(
        ("ask", "words"),
        [
            ({"inputs": torch.tensor([[5]]), "input_ids": torch.tensor([[5]])}, "two names"),
            ({"inputs": {"input_ids": torch.ones(1, 3).long()}}, r"is a dict.* \*\*encoded"),
            ({"inputs": torch.tensor([[5, 6, 0]]), "pad_token_id": 0}, "ends in padding"),
            ({"inputs": torch.tensor([[5, 6]]), "guidance_scale": 2.0,
              "negative_prompt_ids": torch.tensor([[5, 6]]),
              "negative_prompt_attention_mask": torch.tensor([[1, 0]])}, "ends in padding"),
            ({"inputs": torch.ones(1, 3).long(), "token_type_ids": torch.zeros(1, 3).long()},
             "^token_type_ids=a Tensor.*; leave it out"),
        ],
    )  # fmt: skip
    def test_other_prompts(self, fast, ask, words):
        with pytest.raises(UnsupportedInputError, match=words):
            fast.generate(**ask)

    def test_a_turn_without_a_prompt(self, fast):
        cache = fast.new_cache()
        fast(self.ids(1), past_key_values=cache)
        with pytest.raises(KVCacheError, match="input_ids has 0 tokens but the cache holds 30"):
            fast.generate(past_key_values=cache, bos_token_id=5)

    def test_padding_that_the_end_of_a_text_explains(self, fast):
        ids = torch.tensor([[5, 6, 0]])
        for eos in (0, [7, 0], torch.tensor([0])):
            fast.generate(ids, pad_token_id=0, eos_token_id=eos, max_new_tokens=2)

    def test_a_default_length_is_reserved(self, fast):
        small = optimize(fast, fast.sparda_config.replace(max_tokens=48))
        with pytest.raises(KVCacheError, match="need 50 tokens"):
            small.generate(self.ids())


class TestByPosition:
    """Arguments by position mean what they mean to the model."""

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_forward(self, name):
        model = build(name)
        fast = optimize(model, DENSE)
        ids, mask = TestHonoured.ids(2), torch.ones(2, 30, dtype=torch.long)
        mask[1, :9] = 0
        others = (mask,) if name == "llama" else (None, mask)
        with torch.no_grad():
            want = model(ids, *others).logits
        torch.testing.assert_close(
            fast(ids, *others).logits[:, 9:], want[:, 9:], rtol=1e-3, atol=1e-3
        )
        with pytest.raises(UnsupportedInputError, match="attention_mask is given twice"):
            fast(ids, *others, attention_mask=mask)
        with pytest.raises(UnsupportedInputError, match=r"^99 arguments in a call by position"):
            fast(ids, *[None] * 98)

    def test_generate(self, model, fast):
        config = GenerationConfig(max_new_tokens=4)
        for ids in (TestHonoured.ids(1), TestHonoured.ids(3)):
            assert torch.equal(fast.generate(ids, config), model.generate(ids, config))


IN_FORWARD = {
    "attention_mask": ("late", "longer"),
    "position_ids": (torch.arange(0, 3 * 30, 3)[None], torch.tensor([[77]])),
    "use_cache": (True, False),
    "return_dict": (False, False),
    "logits_to_keep": (torch.tensor([-1, 17]), 1),
}


def kinds(kind):
    return {name for name, row in FORWARD.items() if row.kind == kind}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture(scope="module")
def fast(model):
    return optimize(model, DENSE)


@pytest.mark.parametrize("batch_size", [1, 3])
class TestForward:
    """What the table says of `forward`, against the original model, in prefill and decode."""

    @pytest.mark.parametrize("old_name", [False, True])
    @pytest.mark.parametrize("name", [None, *IN_FORWARD])
    def test_used(self, model, fast, name, old_name, batch_size):
        found = []
        for module in (model, fast):
            late = torch.ones(batch_size, 30, dtype=torch.long)
            late[:, :9] = 0
            values = [late if x == "late" else x for x in IN_FORWARD.get(name, (None, None))]
            if name == "attention_mask":
                values[1] = torch.nn.functional.pad(late, (0, 1), value=1)
            first, then = ({} if name is None else {name: value} for value in values)
            ids = TestHonoured.ids(batch_size)
            with torch.no_grad():
                one = module(ids, **first)
                cache = one[1] if isinstance(one, tuple) else cache_of(one)
                by_name = {"past_key_values" if old_name else CACHE_NAME: cache}
                two = module(ids[:, :1], **by_name, **then)
            kept = slice(None) if name == "logits_to_keep" else slice(9, None)
            found.append((type(one), type(two), len(one), len(two), one[0][:, kept], two[0]))
        want, got = found
        assert got[:4] == want[:4]
        torch.testing.assert_close(got[4:], want[4:], rtol=1e-3, atol=1e-3)
        if name in ("attention_mask", "position_ids"):
            assert not torch.allclose(two[0], fast(ids[:, :1]).logits, atol=1e-2)

    def test_every_used_row_is_tried(self, batch_size):
        del batch_size
        assert kinds("used") == {*IN_FORWARD, "input_ids", "cache", "past_key_values"}
        assert kinds("no effect") == set()

    @pytest.mark.parametrize("name", sorted(kinds("refused")))
    def test_refused(self, fast, name, batch_size):
        ids, cache = TestHonoured.ids(batch_size), fast.new_cache()
        value = name != "is_causal"
        for new in (ids, ids[:, :1]):
            with pytest.raises(UnsupportedInputError, match=rf"^{name}=.* not supported: .*; "):
                fast(new, cache=cache, **{name: value})
            fast(new, cache=cache, **{name: None})
        assert cache.get_seq_length() == 30 + 1

    @pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
    def test_an_output_that_the_config_asks_for(self, fast, name, batch_size, monkeypatch):
        own = f"_{name}" if name == "output_attentions" else name
        monkeypatch.setattr(fast.config, own, True)
        with pytest.raises(UnsupportedInputError, match=f"^{name} of the model's config=True"):
            fast(TestHonoured.ids(batch_size))
        fast(TestHonoured.ids(batch_size), **{name: False})
        assert fast.generate(TestHonoured.ids(batch_size), max_new_tokens=2).shape[1] == 30 + 2

    def test_what_the_config_says_where_the_call_does_not(
        self, model, fast, batch_size, monkeypatch
    ):
        ids = TestHonoured.ids(batch_size)
        for config in (model.config, fast.config):
            monkeypatch.setattr(config, "use_cache", False)
        assert cache_of(fast(ids)) is cache_of(model(ids)) is None
        assert cache_of(fast(ids, use_cache=True)) is not None
