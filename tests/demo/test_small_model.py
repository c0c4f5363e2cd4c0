from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from sparda_compile.demo import small_model
from sparda_compile.errors import BackendUnavailableError
from sparda_compile.evaluation.decode import decode
from sparda_compile.evaluation.reading import read
from sparda_compile.evaluation.tasks import make_batch
from sparda_compile.evaluation.vocabulary import NUM_TOKENS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package without the files of the model."""
    monkeypatch.setattr(small_model, "small_model_folder", lambda: tmp_path / "small_model")
    return tmp_path / "small_model"


def test_folder_is_in_the_package():
    assert small_model.small_model_folder().parts[-3:] == ("sparda_compile", "data", "small_model")


def test_missing_weights(folder):
    assert not small_model.has_small_model()
    with pytest.raises(BackendUnavailableError, match=r"train_small_model\.py"):
        small_model.load_small_model()
    assert small_model.load_small_forecast() is None


def test_loads_what_is_there(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=NUM_TOKENS, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    saved = LlamaForCausalLM(config).half()
    saved.save_pretrained(folder)
    assert small_model.has_small_model()
    loaded = small_model.load_small_model()
    assert not loaded.training
    assert loaded.dtype == torch.float32
    for name, weight in saved.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight.float())


def test_shipped_files_say_how_the_model_was_made():
    with safe_open(small_model.small_model_folder() / "model.safetensors", "pt") as file:
        commands = file.metadata()["command"].split(" && ")
    made = "build/small/model"
    for number, command in enumerate(commands):
        python, *words = command.split()
        assert (python, words[0]) == ("python", "examples/train_small_model.py")
        assert not any(word.startswith(("/", ".", "~")) for word in words)
        assert number == 0 or words[words.index("--start") + 1] == made
        made = words[words.index("--out") + 1] + "/model"


def test_shipped_model_is_small_and_has_the_vocabulary():
    folder = small_model.small_model_folder()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16_000_000
    config = small_model.load_small_model().config
    assert config.vocab_size == NUM_TOKENS
    assert config.num_key_value_heads >= 2


def test_shipped_forecast_was_trained_for_the_configuration():
    info = small_model.load_small_forecast().info
    assert {name: getattr(small_model.SMALL_CONFIG, name) for name in info.sizes} == info.sizes


def test_shipped_model_finds_needles():
    model = small_model.load_small_model()
    forecast = small_model.load_small_forecast()
    batch = make_batch("multi_query", batch_size=2, length=2048, seed=3)
    start, last = batch.question_start, int(batch.answer_positions_A[-1])
    config = small_model.SMALL_CONFIG.replace(top_k=4)
    modes = ("dense", "query", *(["forecast"] if forecast else []))
    reading = read(model, batch.ids_BT[:, :start])
    for mode in modes:
        decoded = decode(
            model, reading, batch.ids_BT[:, start:last], config.replace(mode=mode),
            forecast=forecast,
        )  # fmt: skip
        predicted = decoded.logits_BSV.argmax(-1)[:, batch.answer_positions_A - 1 - start]
        assert torch.equal(predicted, batch.answers_BA), mode
