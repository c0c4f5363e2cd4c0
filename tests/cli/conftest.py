from __future__ import annotations

import functools

import pytest
import torch
import typer.main
import typer.testing
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from sparda_compile import environment
from sparda_compile.bench import memory, suite
from sparda_compile.bench.suite import Part
from sparda_compile.cli import bench, labs
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


def spread(us):
    return {"median": us, "low": us, "high": us, "runs": 3, "h2d_bytes": 1000}


class FakeLab:
    """Measures nothing; remembers what it was asked for."""

    def __init__(self, name, asked):
        self.name = name
        self.asked = asked

    def decode(self, setting, save, *, with_baselines):
        self.asked.append((self.name, setting, with_baselines))
        if setting.batch_size == 8:
            raise RuntimeError("CUDA error")
        row = {"scheduled": spread(4000.0), "tokens_per_s": 250.0 * setting.batch_size}
        result = {
            "batch_size": setting.batch_size,
            "max_tokens": setting.max_tokens,
            "by_overlap": {str(overlap): row for overlap in setting.overlaps},
            "skipped": {"dense": "its KV cache is too big"},
        }
        save(result)
        return result

    def budget(self, gib, setting, save):
        self.asked.append((self.name, setting, gib))
        side = {"batch_size": 2, "limited_by": "budget", "device_gib": 1.0, "host_gib": 0.0}
        save({"budget_gib": gib, "resident": side, "scheduled": side, "by_overlap": {}})

    def prefill(self, setting, file):
        self.asked.append((self.name, setting, "prefill"))
        skipped = dict.fromkeys(setting.programs, "no time")
        file.save({"tokens": setting.tokens[0], "programs": {}, "skipped": skipped})

    def turns(self, setting, file):
        self.asked.append((self.name, setting, "turns"))
        skipped = dict.fromkeys(setting.programs, "no time")
        file.save({"past": setting.past[0], "programs": {}, "skipped": skipped})


@pytest.fixture
def asked(monkeypatch):
    asked = []

    def lab(shape, say, max_host_gib):
        asked.append((shape, max_host_gib))
        return FakeLab(shape, asked)

    monkeypatch.setattr(labs, "require_gpu", lambda command: None)
    monkeypatch.setattr(labs, "make_lab", lab)
    monkeypatch.setattr(environment, "_commit", lambda: "abc123")
    monkeypatch.setattr(memory, "free_everything", lambda: None)
    monkeypatch.setattr(suite, "free_everything", lambda: None)
    monkeypatch.setattr(bench, "prr_part", lambda *args: Part("prr", 1.0, lambda: True, list))
    return asked
