from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.ranks.agreement import ALONE, Ranks
from sparda_compile.training import parallel


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


@pytest.fixture
def processes(monkeypatch):
    """A world of six processes, and the members of a model's group."""

    def make(members):
        monkeypatch.setattr(parallel, "world_size", lambda: 6)
        monkeypatch.setattr(parallel, "group_named", lambda name: name)
        monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: members)
        return Ranks(len(members), 0, "group")

    return make


def test_a_process_is_a_replica_of_its_own_or_shares_one(processes, monkeypatch):
    assert parallel.Replicas.of(ALONE) == parallel.Replicas(1, 0)
    assert parallel.Replicas.of(processes([2, 3])) == parallel.Replicas(3, 1)
    assert parallel.Replicas.of(processes([3, 4, 5])) == parallel.Replicas(2, 1)
    monkeypatch.setattr(parallel, "rank", lambda: 4)
    assert parallel.Replicas.of(ALONE) == parallel.Replicas(6, 4)


@pytest.mark.parametrize("members", [[0, 1, 2, 3], [0, 2], [1, 2]])
def test_processes_that_are_no_whole_replicas_are_refused(processes, members):
    with pytest.raises(UnsupportedInputError, match=r"replicas that train .*replica_plan\(tp\)"):
        parallel.Replicas.of(processes(members))


def test_a_mean_is_over_all_processes_or_over_ranks(processes, monkeypatch):
    asked = []
    monkeypatch.setattr(dist, "all_reduce", lambda flat, group: asked.append(group) or flat.mul_(3))
    tensors = [torch.tensor([2.0, 4.0]), torch.tensor(6.0)]
    ranks = processes([0, 1])
    parallel.average_(tensors)
    assert torch.equal(tensors[0], torch.tensor([1.0, 2.0]))
    parallel.average_(tensors, ranks)
    assert torch.equal(tensors[1], torch.tensor(4.5))
    parallel.average_(tensors, ALONE)
    assert asked == [None, "group"]
