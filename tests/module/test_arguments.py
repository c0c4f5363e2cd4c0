"""The tables of arguments: they are complete, and each row is true of `generate` and `forward`."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    WatermarkingConfig,
)

from sparda_compile import SpardaConfig, optimize
from sparda_compile.capture.cache_name import CACHE_NAME, cache_of
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.module.arguments import CONFIG, FORWARD, GENERATE
from sparda_compile.testing import tiny_llama

DENSE = SpardaConfig(mode="query", top_k=None, lowering="eager", block_size=16)
LENGTH = 20
IS_OLD = CACHE_NAME != "cache"
INF = float("inf")
NOT_HERE = "5.24" if IS_OLD else "5.17"


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture(scope="module")
def fast(model):
    return optimize(model, DENSE)


def prompt(batch_size, length=LENGTH):
    """Return text of ragged lengths, padded on the left with 0."""
    generator = torch.Generator().manual_seed(batch_size)
    ids = torch.randint(2, 250, (batch_size, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch_size):
        mask[row, : 4 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def tokenizer():
    vocabulary = {f"<{n}>": n for n in range(1, 256)} | {"abcdef": 0}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<1>")))


class Seen:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value.tolist())

    def end(self):
        self.tokens.append("end")


def one_step(model, input_ids, **kwargs):
    wanted = ("attention_mask", "position_ids", CACHE_NAME)
    out = model(input_ids, **{n: kwargs[n] for n in wanted if kwargs.get(n) is not None})
    return out.logits[:, -1].argsort(descending=True)[:, :5]


def add_to_token_9(ids, scores):
    scores[:, 9] += 40
    return scores


SAMPLE = {"do_sample": True, "temperature": 2.0}
NO_MASK = {"attention_mask": None}
NO_PROMPT = {"input_ids": None, "attention_mask": "one"}
MOST = [f"<{n}>" for n in range(2, 250) if n % 4]
BEAMS = {"num_beams": 3, "eos_token_id": list(range(2, 250, 3)), "max_new_tokens": 16}

# Argument -> its value, and what else the call says; `told` are the tokens without any of it.
USED = {
    "max_length": lambda told: (LENGTH + 3, {"max_new_tokens": None}),
    "max_new_tokens": lambda told: (3, {}),
    "max_time": lambda told: (0.0, {}),
    "stop_strings": lambda told: (MOST, {"tokenizer": tokenizer()}),
    "eos_token_id": lambda told: ([told[3], 1], {}),
    "pad_token_id": lambda told: (0, {**NO_MASK, "pad_token_id": None, "input_ids": "padded"}),
    "bos_token_id": lambda told: (7, {**NO_PROMPT, "bos_token_id": 9}),
    "do_sample": lambda told: (True, {"temperature": 5.0}),
    "temperature": lambda told: (3.0, {"do_sample": True}),
    "top_k": lambda told: (3, SAMPLE),
    "top_p": lambda told: (0.3, SAMPLE),
    "min_p": lambda told: (0.5, SAMPLE),
    "top_h": lambda told: (0.3, SAMPLE),
    "typical_p": lambda told: (0.3, SAMPLE),
    "epsilon_cutoff": lambda told: (0.02, {**SAMPLE, "top_k": 0}),
    "eta_cutoff": lambda told: (0.3, {**SAMPLE, "top_k": 0}),
    "repetition_penalty": lambda told: (1.8, {}),
    "encoder_repetition_penalty": lambda told: (1.8, {}),
    "no_repeat_ngram_size": lambda told: (1, {}),
    "encoder_no_repeat_ngram_size": lambda told: (1, {}),
    "bad_words_ids": lambda told: ([[told[1]], [told[2], told[3]]], {}),
    "renormalize_logits": lambda told: (True, {"suppress_tokens": [9]}),
    "forced_bos_token_id": lambda told: (7, {"input_ids": "one", "attention_mask": "one"}),
    "forced_eos_token_id": lambda told: (7, {}),
    "remove_invalid_values": lambda told: (True, {"sequence_bias": {(3,): INF}}),
    "exponential_decay_length_penalty": lambda told: ((2, 1.7), {"eos_token_id": 1}),
    "suppress_tokens": lambda told: ([told[0], told[4]], {}),
    "begin_suppress_tokens": lambda told: ([told[0]], {}),
    "sequence_bias": lambda told: ({(told[1],): -50.0}, {}),
    "watermarking_config": lambda told: (WatermarkingConfig(bias=9.0), {}),
    "min_length": lambda told: (LENGTH + 6, {"eos_token_id": told[2]}),
    "min_new_tokens": lambda told: (6, {"eos_token_id": told[2]}),
    "guidance_scale": lambda told: (2.5, {}),
    "num_return_sequences": lambda told: (2, SAMPLE),
    "num_beams": lambda told: (3, {}),
    "early_stopping": lambda told: (True, BEAMS),
    "length_penalty": lambda told: (4.0, BEAMS),
    "output_scores": lambda told: (False, {}),
    "output_logits": lambda told: (True, {}),
    "return_dict_in_generate": lambda told: (False, {}),
    "use_cache": lambda told: (False, {}),
}  # fmt: skip
USED_IN_CALLS = {
    "inputs": lambda told: ("one", {**NO_PROMPT, "bos_token_id": 7}),
    "logits_processor": lambda told: (LogitsProcessorList([add_to_token_9]), {}),
    "prefix_allowed_tokens_fn": lambda told: (lambda row, ids: [row + 3, 9, int(ids[-1])], {}),
    "stopping_criteria": lambda told: (StoppingCriteriaList([MaxLengthCriteria(LENGTH + 2)]), {}),
    "negative_prompt_ids": lambda told: ("short", {"guidance_scale": 2.5}),
    "negative_prompt_attention_mask": lambda told: (
        "short mask", {"guidance_scale": 2.5, "negative_prompt_ids": "short"},
    ),
    "custom_generate": lambda told: (one_step, {}),
    "position_ids": lambda told: (torch.arange(0, 3 * LENGTH, 3)[None], {}),
    "attention_mask": lambda told: ("late", {}),
    "input_ids": lambda told: ("padded", {}),
    "logits_to_keep": lambda told: (torch.tensor([0]), {}),
}  # fmt: skip
IDLE = {
    "diversity_penalty": 0.7,
    "low_memory": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9,
    "max_matching_ngram_size": 3,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "any",
    "cache_config": {"nbits": 4},
    "max_cache_len": 64,
    "compile_config": CompileConfig(),
    "disable_compile": False,
    "continuous_batching_config": {"any": 1},
    "decoder_start_token_id": 5,
    "transformers_version": "4.0.0",
    "_from_model_config": True,
    "_commit_hash": "any",
    "assistant_tokenizer": "any",
    "trust_remote_code": True,
}
# Of those, what a GenerationConfig of this transformers has; each supported version tests its own.
IDLE_HERE = [name for name in IDLE if name not in CONFIG or CONFIG[name].only != NOT_HERE]
REFUSED = {
    "output_attentions": True,
    "output_hidden_states": True,
    "cache_implementation": "static",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "use_mtp": True,
    "is_assistant": True,
    "token_healing": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "constraints": ["any"],
    "force_words_ids": [[5]],
    "num_beam_groups": 2,
    "prefill_chunk_size": 1,
}
REFUSED_IN_CALLS = {
    "synced_gpus": True,
    "assistant_model": "any",
    "return_dict": True,
    "custom_generate": "owner/name",
}


def kinds(kind, *tables):
    return {name for table in tables for name, row in table.items() if row.kind == kind}


def test_every_row_is_tried():
    also = {"generation_config", "streamer", "tokenizer", "prefill_chunk_size"}
    assert set(USED) | set(USED_IN_CALLS) - FORWARD.keys() | also == kinds("used", CONFIG, GENERATE)
    assert set(IDLE) == kinds("no effect", CONFIG, GENERATE, FORWARD)
    assert kinds("refused", CONFIG) == set(REFUSED) - {"prefill_chunk_size"}
    assert kinds("refused", GENERATE) == set(REFUSED_IN_CALLS) - {"custom_generate"}


def resolved(batch_size, settings):
    """Return a call's arguments, with those that depend on the batch size filled in."""
    asked = {**prompt(batch_size), "max_new_tokens": 8, "output_scores": True, **settings}
    ids, mask = prompt(batch_size).values()
    padded, late = ids.clone(), mask.clone()
    padded[:, :4], late[:, :9] = 0, 0
    forms = {
        "padded": padded, "late": late, "short": ids[:, -9:], "short mask": late[:, 4:13],
        ("one", "input_ids"): ids[:, -1:], ("one", "attention_mask"): mask[:, -1:],
        ("one", "inputs"): ids[:, -1:],
    }  # fmt: skip
    for name, value in asked.items():
        if isinstance(value, str):
            asked[name] = forms.get(value, forms.get((value, name), value))
    return {"return_dict_in_generate": True, **{n: v for n, v in asked.items() if v is not None}}


def generated(module, settings, route="call"):
    """Generate, with the attributes of the config as arguments, in a config, or saved before."""
    calls = {n: v for n, v in settings.items() if n not in CONFIG}
    config = {n: v for n, v in settings.items() if n in CONFIG}
    before = module.generation_config
    torch.manual_seed(1)
    try:
        if route == "saved":
            module.generation_config = GenerationConfig(**config)
            return fields(module.generate(**calls))
        if route == "given":
            return fields(module.generate(**calls, generation_config=GenerationConfig(**config)))
        return fields(module.generate(**settings))
    finally:
        module.generation_config = before


def fields(output):
    """Return what a call returned, as tensors by name."""
    if isinstance(output, torch.Tensor):
        return {"alone": output}
    found = {"has cache": torch.tensor(cache_of(output) is not None)}
    for name in ("sequences", "scores", "logits", "sequences_scores"):
        value = getattr(output, name, None)
        if value is not None:
            found[name] = value if isinstance(value, torch.Tensor) else torch.stack(value)
    return found


def alike(left, right):
    return left.keys() == right.keys() and all(
        left[n].shape == right[n].shape
        and torch.allclose(left[n].float(), right[n].float(), rtol=1e-3, atol=1e-3, equal_nan=True)
        for n in left
    )


@pytest.fixture(scope="module")
def told(model):
    """Return the eight tokens that follow each prompt."""
    return {n: model.generate(**prompt(n), max_new_tokens=8)[0, LENGTH:].tolist() for n in (1, 3)}


# Every attribute comes in every way, and with both numbers of sequences, but not in every way with
# both: how it came in is forgotten before the sequences are looked at.
ROUTES = {1: ("call", "saved"), 3: ("given",)}


@pytest.fixture(scope="module")
def plain(fast):
    """Return what is generated of each prompt when nothing is asked for."""
    return {n: generated(fast, resolved(n, {})) for n in (1, 3)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [1, 3])
class TestGenerate:
    """What the tables say of `generate`, against the original model."""

    def check(self, model, fast, name, settings, value, routes):
        batch_size = len(settings.pop("batch"))
        base = resolved(batch_size, settings)
        asked = resolved(batch_size, {**settings, name: value})
        want = generated(model, asked)
        assert not alike(want, generated(model, base)), f"{name} has no effect on the original"
        for route in routes:
            assert alike(generated(fast, asked, route), want), route

    @pytest.mark.parametrize("name", USED)
    def test_used_attributes(self, model, fast, told, name, batch_size):
        value, settings = USED[name](told[batch_size])
        settings = {**settings, "batch": range(batch_size)}
        self.check(model, fast, name, settings, value, ROUTES[batch_size])

    @pytest.mark.parametrize("name", USED_IN_CALLS)
    def test_used_arguments(self, model, fast, told, name, batch_size):
        value, settings = USED_IN_CALLS[name](told[batch_size])
        settings = {**settings, "batch": range(batch_size)}
        self.check(model, fast, name, settings, value, ("call",))

    def test_streamer(self, model, fast, batch_size):
        del batch_size  # transformers streams one sequence
        seen = [Seen(), Seen()]
        for module, streamer in zip((model, fast), seen, strict=True):
            module.generate(**prompt(1), max_new_tokens=5, streamer=streamer)
        assert seen[0].tokens == seen[1].tokens
        assert len(seen[1].tokens) == 7

    def test_prefill_chunk_size(self, model, fast, batch_size):
        cache, ask = fast.new_cache(), resolved(batch_size, {"prefill_chunk_size": 7})
        assert alike(generated(fast, ask), generated(model, ask))
        fast.generate(**ask, past_key_values=cache)
        assert [mask.shape[1] for _, mask in cache._passed] == [7, 7, 6, *[1] * 7]

    @pytest.mark.parametrize("name", IDLE_HERE)
    def test_without_effect(self, model, fast, plain, name, batch_size):
        with_it = resolved(batch_size, {name: IDLE[name]})
        assert alike(generated(model, with_it), plain[batch_size])
        for route in ROUTES[batch_size] if name in CONFIG else ("call",):
            assert alike(generated(fast, with_it, route), plain[batch_size]), route

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused_attributes(self, fast, name, batch_size, monkeypatch):
        words = rf"^{name}=.* is not supported: .*[;:] "
        base = {"max_new_tokens": 2}
        for kwargs in (
            {name: REFUSED[name]},
            {"generation_config": GenerationConfig(**base, **{name: REFUSED[name]})},
        ):
            with pytest.raises(UnsupportedInputError, match=words):
                fast.generate(**prompt(batch_size), **base, **kwargs)
        saved = GenerationConfig(**{name: REFUSED[name]})
        monkeypatch.setattr(fast.captures.original, "generation_config", saved)
        fresh = optimize(fast, DENSE)
        for kwargs in ({}, {"generation_config": GenerationConfig(**base)}):
            with pytest.raises(UnsupportedInputError, match=words):
                fresh.generate(**prompt(batch_size), **base, **kwargs)

    @pytest.mark.parametrize("name", REFUSED_IN_CALLS)
    def test_refused_arguments(self, fast, name, batch_size):
        with pytest.raises(UnsupportedInputError, match=rf"^{name}=.* is not supported: .*[;:] "):
            fast.generate(**prompt(batch_size), **{name: REFUSED_IN_CALLS[name]})

    def test_what_refused_attributes_may_be(self, model, fast, batch_size):
        config = {
            "num_beam_groups": 1, "penalty_alpha": 0.0, "cache_implementation": "hybrid",
            "output_attentions": False, "token_healing": False, "is_assistant": False,
        }  # fmt: skip
        ask = resolved(batch_size, config)
        for route in ROUTES[batch_size]:
            assert alike(generated(fast, ask, route), generated(model, resolved(batch_size, {})))
