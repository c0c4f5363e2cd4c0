from __future__ import annotations

import functools

import pytest
import torch
import typer.main
import typer.testing
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from sparda_compile.cli import main as cli


@pytest.fixture(autouse=True)
def _width_of_a_pipe(monkeypatch):
    """Tables are as wide as in a pipe, whatever runs the tests has told them."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session", autouse=True)
def _read_the_signatures_once():
    """The command line is made of the commands' signatures; typer would read all for each call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture
def sparda(tmp_path, monkeypatch):
    """Run the command line in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return CliRunner().invoke(cli.app, [str(a) for a in arguments])

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer):
    """A small random model with a tokenizer of bytes, saved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path
