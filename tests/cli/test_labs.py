import pytest
import torch

from sparda_compile.bench.memory import GIB
from sparda_compile.cli import labs
from sparda_compile.errors import ConfigError


def test_lab_is_told_how_much_cpu_memory_it_may_take():
    lab = labs.make_lab("tiny", lambda text: None, 1.5)
    assert lab.max_host_bytes == 1.5 * GIB
    assert labs.make_lab("tiny", lambda text: None, None).max_host_bytes is None


def test_without_a_gpu_a_command_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"`sparda bench x` measures a CUDA GPU, .* sees none"):
        labs.require_gpu("sparda bench x")
