"""A process group in one process: of torch's backend `fake` with two ranks, or of gloo with one."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch.distributed as dist
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextlib.contextmanager
def group(backend, store, rank, size):
    hook = sys.excepthook
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.excepthook = hook
        _clear_sharding_prop_cache()


@pytest.fixture
def mesh():
    """A mesh of two ranks, of which this process is the second."""
    with group("fake", FakeStore(), 1, 2):
        yield init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))


@pytest.fixture
def alone():
    """The name of a gloo group of this process."""
    with group("gloo", dist.HashStore(), 0, 1):
        yield dist.group.WORLD.group_name
