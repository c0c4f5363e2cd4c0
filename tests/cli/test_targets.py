from __future__ import annotations

import json

import pytest
import torch

from sparda_compile.cli import targets
from sparda_compile.cli.targets import build_target, load_shared, load_target, load_tokenizer
from sparda_compile.errors import ConfigError
from sparda_compile.testing import build


def devices(model):
    return {parameter.device.type for parameter in model.parameters()}


def test_model_type_is_built_without_weights():
    model = build_target("gpt2")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert devices(model) == {"meta"}
    assert not model.training


def test_tiny_model_has_weights():
    model = build_target("tiny-qwen3-moe")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert devices(model) == {"cpu"}


def test_folder_is_built_from_its_config_alone(tmp_path):
    fields = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    fields |= {"bos_token_id": None, "eos_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = build_target(str(tmp_path))
    assert model.config.n_embd == 32
    assert devices(model) == {"meta"}


def test_code_of_a_folder_is_not_run(tmp_path):
    fields = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigError, match="transformers cannot read"):
        build_target(str(tmp_path))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("llamas", "Did you mean 'llama'"),
        ("t5", "no model that can be inspected"),
        ("tiny-t5", "tiny-plain"),
        ("no/such/folder", "has no config.json"),
    ],
)
def test_unknown_target(target, words):
    with pytest.raises(ConfigError, match=words):
        build_target(target)


def test_config_that_cannot_be_built(tmp_path):
    fields = {"model_type": "llama", "hidden_size": "wide"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="transformers cannot"):
        build_target(str(tmp_path))


class TestLoad:
    def test_tiny_model(self):
        model = load_target("tiny-llama")
        assert type(model).__name__ == "LlamaForCausalLM"
        assert not model.training

    def test_folder_with_weights(self, tmp_path):
        model = build("llama").to(torch.bfloat16)
        model.save_pretrained(tmp_path)
        loaded = load_target(str(tmp_path))
        assert not loaded.training
        weights = loaded.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())

    def test_what_has_no_weights(self, tmp_path):
        with pytest.raises(ConfigError, match=r"'llama' is no folder.*tiny-llama"):
            load_target("llama")
        with pytest.raises(ConfigError, match=r"has no config.json"):
            load_target(str(tmp_path))
        build("llama").config.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"cannot load a causal LM from"):
            load_target(str(tmp_path))

    def test_tokenizer_of_a_folder(self, tmp_path, byte_tokenizer):
        build("llama").config.save_pretrained(tmp_path)
        with pytest.raises(
            ConfigError, match=r"has no tokenizer that .* tokenizer.save_pretrained"
        ):
            load_tokenizer(str(tmp_path))
        byte_tokenizer.save_pretrained(tmp_path)
        assert load_tokenizer(str(tmp_path))("text").input_ids == byte_tokenizer("text").input_ids

    def test_what_has_no_tokenizer(self):
        with pytest.raises(ConfigError, match="'tiny-llama' has no tokenizer; pass a folder"):
            load_tokenizer("tiny-llama")

    def test_the_real_model_by_its_name(self, monkeypatch):
        monkeypatch.setattr(targets, "load_real_model", lambda: "the model")
        monkeypatch.setattr(targets, "load_real_tokenizer", lambda: "its tokenizer")
        assert load_target("smollm2") == "the model"
        assert load_tokenizer("smollm2") == "its tokenizer"


@pytest.mark.parametrize("name", ["tiny-llama", "smollm2"])
def test_what_is_no_folder_cannot_be_shared(name):
    with pytest.raises(ConfigError, match="is no folder, and --tp shards a model that"):
        load_shared(name, None, torch.device("cpu"))


def test_a_shared_model_is_in_float32_on_a_cpu(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        targets, "_from_folder", lambda folder, **fields: asked.update(fields, folder=folder)
    )
    load_shared(str(tmp_path), "plan", torch.device("cpu"))
    assert asked.pop("dtype") == torch.float32
    load_shared(str(tmp_path), "plan", torch.device("cuda", 1))
    assert asked == {"folder": str(tmp_path), "distributed_config": "plan", "dtype": "auto"}
