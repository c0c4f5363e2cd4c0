"""A model to measure on several ranks: real shape, random weights, sharded as transformers does.

No checkpoint is written: a model without memory is sharded by transformers' own code, and each rank
then fills its own part. What all ranks have whole is the same on all of them.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparda_compile.bench.shapes import build_model
from sparda_compile.ranks.shards import is_sharded, local_of

if TYPE_CHECKING:
    from sparda_compile.bench.shapes import ModelShape

__all__ = ["build_sharded_model"]


def build_sharded_model(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, num_ranks: int
) -> nn.Module:
    """Return this rank's part of a Llama of that shape, in eval mode.

    Args:
        shape: The model's sizes.
        device: Of this rank.
        dtype: Of the weights.
        num_ranks: Processes of the process group, which has to be there.
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    hollow: Any = build_model(shape, torch.device("meta"), dtype)
    plan, _, mesh = hollow.prepare_distribute_model(DistributedConfig(tp_size=num_ranks))
    model: Any = hollow.maybe_distribute_model(hollow, plan, mesh)
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            module._parameters[name] = _filled(weight, f"{path}.{name}", device)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    filled: nn.Module = model.eval()
    return filled


def _filled(weight: Any, name: str, device: torch.device) -> nn.Parameter:
    """Return a parameter with memory: random numbers, or ones for a norm."""
    seed = zlib.crc32(name.encode())
    if is_sharded(weight):
        seed += 1 + int(weight.device_mesh.get_local_rank())
    local = local_of(weight)
    mine = torch.ones(local.shape, dtype=local.dtype, device=device)
    if mine.dim() > 1:
        generator = torch.Generator(device=device).manual_seed(seed)
        mine.normal_(std=0.02, generator=generator)
    if not is_sharded(weight):
        return nn.Parameter(mine, requires_grad=False)
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(
        mine,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
    return nn.Parameter(whole, requires_grad=False)
