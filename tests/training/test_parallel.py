from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.module.planned_ranks import as_first_rank
from sparda_compile.testing import build
from sparda_compile.training import parallel
from sparda_compile.training.trainer import ForecastTrainer

# A program of its own: PyTorch does not train in a fork of a process that has trained.
ONE_OF_TWO = Path(__file__).with_name("one_of_two.py")


@pytest.mark.slow
def test_two_processes_are_one_that_accumulates(gym, shared_capture, tmp_path):
    batches = gym.batches(4, length=100)
    alone = ForecastTrainer(gym.model, gym.config, 3e-3)
    torch.save({"config": gym.config, "batches": batches}, tmp_path / "task")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*torchrun, ONE_OF_TWO, tmp_path], capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    reports = [alone.step(batches[:2]), alone.step(batches[2:])]
    for name, weight in alone.parameters.items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], weight.detach(), rtol=1e-4, atol=1e-6)
    assert first["tokens"] == [r.num_tokens for r in reports] == [200, 200]
    for mine, report in zip(first["losses"], reports, strict=True):
        torch.testing.assert_close(mine, report.losses, rtol=1e-4, atol=1e-6)
    assert second["losses"] == [], "only the first process reports"


def test_alone_nothing_is_averaged(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tensors = [torch.tensor([1.0, 2.0])]
    with parallel.process_group(torch.device("cpu")):
        parallel.average_(tensors)
        assert (parallel.rank(), parallel.world_size()) == (0, 1)
    assert tensors[0].tolist() == [1.0, 2.0]


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parallel.local_device() == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parallel.local_device() == torch.device("cpu")


def test_a_model_that_is_sharded_is_not_trained_for(gym):
    with (
        as_first_rank(build("llama"), 2) as model,
        pytest.raises(
            UnsupportedInputError, match="sharded over 2 ranks, and a Forecast is trained"
        ),
    ):
        ForecastTrainer(model, gym.config, 3e-3)
