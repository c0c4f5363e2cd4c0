"""A model as one rank would have it, without other processes: to plan with, not to run.

transformers' own code shards a copy without memory over a process group of torch's backend `fake`,
whose collectives do nothing. The plan of every rank is that of the first, but for the last rank's
share of sizes that ranks cannot divide.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from sparda_compile.capture.adapters import without_wrapper
from sparda_compile.errors import ConfigError, UnsupportedInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["as_first_rank"]


@contextlib.contextmanager
def as_first_rank(model: nn.Module, num_ranks: int) -> Iterator[nn.Module]:
    """Give a model as the first of some ranks has it; its weights have no values.

    Args:
        model: A causal LM of transformers that has a plan for tensor parallelism.
        num_ranks: Ranks to plan for.

    Raises:
        ConfigError: If the number is no whole number of 1 or more.
        UnsupportedInputError: If the model has no such plan, or is distributed already.
    """
    if not isinstance(num_ranks, int) or num_ranks < 1:
        raise ConfigError(f"tp={num_ranks!r} is no number of ranks; use 1 or more.")
    if num_ranks == 1:
        yield model
        return
    if dist.is_initialized():
        raise UnsupportedInputError(
            f"tp={num_ranks} plans without processes, and this process is in a process group; call "
            "explain on the model that transformers sharded over it, without tp."
        )
    inner = without_wrapper(model)
    if not isinstance(inner, PreTrainedModel) or not inner.supports_tp_plan:
        raise UnsupportedInputError(
            f"{type(inner).__name__} has no plan for tensor parallelism (tp_plan of transformers), "
            f"so it cannot be planned for tp={num_ranks}."
        )
    with _fake_group(num_ranks):
        yield _sharded(inner, num_ranks)


@contextlib.contextmanager
def _fake_group(num_ranks: int) -> Iterator[None]:
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook  # torch puts its own there, and leaves it
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
        _clear_sharding_prop_cache()  # it holds meshes, which a later one would be taken for


def _sharded(model: Any, num_ranks: int) -> nn.Module:
    from transformers.distributed.configuration_utils import DistributedConfig

    known: dict[int, Any] = {}
    for parameter in model.parameters():
        known[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    for buffer in model.buffers():
        known[id(buffer)] = buffer.to("meta")
    skeleton = copy.deepcopy(model, known)
    plan, _, mesh = skeleton.prepare_distribute_model(DistributedConfig(tp_size=num_ranks))
    sharded: nn.Module = skeleton.maybe_distribute_model(skeleton, plan, mesh)
    return sharded
