from __future__ import annotations

import pytest
from transformers.distributed.configuration_utils import DistributedConfig

from sparda_compile.errors import ConfigError, UnsupportedInputError
from sparda_compile.training import replica_plan as module
from sparda_compile.training.replica_plan import replica_plan


def test_replicas_are_whole_and_their_weights_are_not_sharded(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    plan = replica_plan(2)
    assert (plan.tp_size, plan.dp_replicate_size, plan.fsdp_size, plan.dp_size) == (2, 3, 1, 1)
    assert type(replica_plan(6)) is DistributedConfig, "one replica needs nothing of ours"


@pytest.mark.parametrize("tp", [0, 4])
def test_processes_that_are_no_whole_replicas_are_refused(monkeypatch, tp):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ConfigError, match=f"6 processes are no whole number of replicas of {tp}"):
        replica_plan(tp)


def test_transformers_that_knows_no_replicas_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setattr(module, "DistributedConfig", object)
    with pytest.raises(UnsupportedInputError, match="3 replicas of 2 processes need a newer"):
        replica_plan(2)
