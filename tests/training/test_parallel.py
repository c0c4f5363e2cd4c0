from __future__ import annotations

import multiprocessing
import os
import socket

import pytest
import torch

from sparda_compile import train_forecast
from sparda_compile.forecast_projection import to_tensors
from sparda_compile.training import parallel
from sparda_compile.training.trainer import ForecastTrainer


def work(gym, batches, rank, port, out):
    """Be one of two processes: train on half of the batches and write what came out."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_PORT": str(port)}
    os.environ["MASTER_ADDR"] = "localhost"
    reports = []
    weights = train_forecast(
        gym.model, batches, config=gym.config, steps=2, lr=3e-3, on_step=reports.append
    )
    assert parallel.world_size() == 1, "the group must be left"
    told = {"losses": [r.losses for r in reports], "tokens": [r.num_tokens for r in reports]}
    torch.save({"weights": to_tensors(weights.projections), **told}, out)
    # Not by returning: the process is a copy of pytest's.
    os._exit(0)


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="trains in forks of this process, and where there is a GPU PyTorch refuses it: autograd "
    "has started a thread for each device, which a fork loses ('Unable to handle autograd's "
    "threading in combination with fork-based multiprocessing'). It tests how two processes "
    "exchange gradients on the CPU, by gloo; a machine without a GPU runs it",
)
def test_two_processes_are_one_that_accumulates(gym, shared_capture, tmp_path):
    batches = gym.batches(4, length=100)
    alone = ForecastTrainer(gym.model, gym.config, 3e-3)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Forked, so that neither imports nor traces again.
    context = multiprocessing.get_context("fork")
    paths = [tmp_path / f"rank{rank}" for rank in range(2)]
    workers = [
        context.Process(target=work, args=(gym, batches, rank, port, path), daemon=True)
        for rank, path in enumerate(paths)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    first, second = (torch.load(path) for path in paths)
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
