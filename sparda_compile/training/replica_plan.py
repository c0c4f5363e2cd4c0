"""How to load a model on some of the processes, and whole replicas of it on the others."""

from __future__ import annotations

from transformers.distributed.configuration_utils import DistributedConfig

from sparda_compile.errors import ConfigError, UnsupportedInputError
from sparda_compile.training.parallel import world_of_environment

__all__ = ["replica_plan"]


class _Replicated(DistributedConfig):
    """Tensor parallelism beside whole replicas.

    transformers shards weights over replicas, too (FSDP), which are then gathered for each layer.
    Here nothing of the model is trained, and each replica keeps its weights.
    """

    @property
    def dp_size(self) -> int:
        """Processes over which transformers is to shard weights: none."""
        return 1


def replica_plan(tp: int) -> DistributedConfig:
    """Return what `from_pretrained` takes as `distributed_config`, to train on several replicas.

    Args:
        tp: Processes that share one replica, neighbours by their number; torchrun has started a
            multiple of them.

    Raises:
        ConfigError: If it has not.
        UnsupportedInputError: If this version of transformers knows no replicas.
    """
    world = world_of_environment()
    if tp < 1 or world % tp:
        raise ConfigError(
            f"{world} processes are no whole number of replicas of {tp}; start a multiple with "
            "torchrun --nproc-per-node."
        )
    if world == tp:
        return DistributedConfig(tp_size=tp)
    if not hasattr(DistributedConfig, "dp_size"):
        raise UnsupportedInputError(
            f"{world // tp} replicas of {tp} processes need a newer transformers, such as 5.24; "
            f"start {tp} processes, or leave tp out."
        )
    return _Replicated(tp_size=tp, dp_replicate_size=world // tp)
