from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from sparda_compile.cli.devices import check_memory, find_device
from sparda_compile.cli.main import app
from sparda_compile.errors import ConfigError


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)


@pytest.fixture
def two_gpus(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: gpu)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.mark.parametrize(
    "name", ["abc", "", "cuda", "cuda:99", "cuda:-1", "meta", "cpu:1", "mps", "xpu:0"]
)
def test_what_is_not_there_is_a_sentence(no_accelerator, name):
    assert find_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="use cpu, the only device here"):
        find_device(name)


def test_with_two_gpus(two_gpus):
    assert find_device("cuda:1") == torch.device("cuda:1")
    assert find_device("cuda").type == "cuda"
    for name in ("cuda:2", "cuda:99", "xpu"):
        with pytest.raises(ConfigError, match="use cpu, or cuda:0 to cuda:1"):
            find_device(name)


@pytest.mark.parametrize("name", ["abc", "cuda", "cuda:99"])
@pytest.mark.parametrize("command", [["eval"], ["bench", "start"]])
def test_commands_say_so_in_one_sentence(no_accelerator, command, name, tmp_path):
    out = ["--out", str(tmp_path)] if command[0] == "bench" else []
    result = CliRunner().invoke(app, [*command, "--device", name, *out])
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert name in result.stderr
    assert not list(tmp_path.iterdir())


def test_keys_and_values_must_fit():
    config = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    check_memory(config, 1, 100, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"GiB free; lower the number of tokens"):
        check_memory(config, 1 << 16, 1 << 31, torch.device("cpu"))
