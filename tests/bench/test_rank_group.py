from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from sparda_compile.bench.rank_group import rank_device, rank_group
from sparda_compile.errors import ConfigError


def test_fewer_gpus_than_ranks_are_refused_but_for_the_tiny_shape(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"--tp 2 measures 2 CUDA GPUs, and .* sees 1"):
        rank_device(2, "8b")
    assert rank_device(2, "tiny") == torch.device("cpu")


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert rank_device(4, "8b") == torch.device("cuda", 3)


@pytest.mark.parametrize("started", ["1", "3"])
def test_another_number_of_processes_is_refused(monkeypatch, started):
    monkeypatch.setenv("WORLD_SIZE", started)
    with (
        pytest.raises(ConfigError, match=f"--tp 2 was started in {started} processes"),
        rank_group("tiny", 2),
    ):
        pass
    assert not dist.is_initialized()
