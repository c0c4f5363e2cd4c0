"""A model that transformers has sharded: its DTensors, its mesh, and the part of each rank.

`from_pretrained(..., distributed_config=DistributedConfig(tp_size=N))` leaves a DTensor in the
place of each parameter that is sharded. A program is made of local tensors, so each DTensor stands
for the part of it that this rank holds.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from sparda_compile.errors import UnsupportedInputError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "check_heads",
    "is_sharded",
    "local_names",
    "local_of",
    "mesh_of",
    "meshes_in",
    "shard_range",
    "splits_heads",
]


_KEYS: Final = re.compile(r"\b(k_proj|qkv_proj|query_key_value)\b")
_QUERIES: Final = re.compile(r"\bq_proj\b")
# Styles of transformers' plans that put the parts of all ranks together again.
_GATHERED: Final = ("colwise_gather_output", "colwise_rep")


def is_sharded(value: Any) -> bool:
    """Whether a value is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """Return the part of a DTensor that this rank holds; any other tensor as it is."""
    local: Tensor = tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return local


def local_names(model: nn.Module) -> dict[int, str]:
    """Return the name of each parameter that is a DTensor, by the id of its local part."""
    named = model.named_parameters(remove_duplicate=False)
    found = {id(local_of(tensor)): name for name, tensor in named if is_sharded(tensor)}
    return found


def shard_range(tensor: Tensor, dim: int) -> tuple[int, int]:
    """Return which indices of a dimension this rank holds, as DTensor shards them.

    Args:
        tensor: A DTensor that is sharded in that dimension.
        dim: The dimension.

    Returns:
        The first index, and how many there are; the last ranks may hold fewer.
    """
    sharded: Any = tensor
    mesh = sharded.device_mesh
    most = -(-sharded.shape[dim] // mesh.size())
    return min(most * mesh.get_local_rank(), sharded.shape[dim]), local_of(tensor).shape[dim]


def mesh_of(model: nn.Module) -> Any:
    """Return the device mesh that a model is sharded over; None for one that is not sharded.

    Raises:
        UnsupportedInputError: If there are several meshes, or one of more than one dimension, as
            with FSDP, expert or pipeline parallelism.
    """
    sharded: list[Any] = [p for p in model.parameters() if is_sharded(p)]
    found = {id(p.device_mesh): p.device_mesh for p in sharded}
    name = type(model).__name__
    stages = getattr(getattr(model, "_device_mesh", None), "mesh_dim_names", None) or ()
    sizes = _sizes(getattr(model, "_device_mesh", None))
    others = [dim for dim in stages if dim != "tp" and sizes.get(dim, 1) > 1]
    meshes = list({mesh: mesh for mesh in found.values()}.values())
    if others or len(meshes) > 1 or any(mesh.ndim != 1 for mesh in meshes):
        what = ", ".join(f"{dim}={sizes[dim]}" for dim in others) or f"{len(meshes)} meshes"
        raise UnsupportedInputError(
            f"{name} is distributed by more than tensor parallelism ({what}); optimize runs models "
            "that are sharded over one mesh of one dimension: DistributedConfig(tp_size=N) alone."
        )
    return meshes[0] if meshes else None


def splits_heads(model: nn.Module) -> bool:
    """Whether each rank has KV heads of its own, rather than all of them.

    A plan may cut the rows of the projections and gather what comes out of them, as those of Olmo2
    and MiniMax-M2 do for their norms over all heads: then every rank attends with every head.
    """
    return _splits(model, _KEYS)


def check_heads(model: nn.Module, num_ranks: int) -> None:
    """Refuse a model whose heads cannot be given to ranks in equal numbers.

    Selection, KV pool and attention are those of whole KV heads.

    Args:
        model: A model; one of which every rank has all heads passes.
        num_ranks: Ranks that share it.

    Raises:
        UnsupportedInputError: If some rank would have another number of heads, or a part of one,
            or other query heads than those of its KV heads.
    """
    has_keys = any(_KEYS.search(name) for name, _ in model.named_parameters())
    if num_ranks == 1 or not has_keys or not (_splits(model, _QUERIES) or splits_heads(model)):
        return
    config: Any = model.config
    config = config.get_text_config()
    query = int(getattr(config, "num_attention_heads", 0) or 0)
    kv = int(getattr(config, "num_key_value_heads", 0) or query)
    heads = f"{type(model).__name__} has {query} query heads and {kv} KV heads"
    if not splits_heads(model):
        raise UnsupportedInputError(
            f"{heads}, and its tp_plan splits the first among {num_ranks} ranks but leaves every "
            "rank all of the second; transformers then takes the wrong KV heads for a query. Use "
            "tp_plan='auto'."
        )
    if kv % num_ranks or query % num_ranks:
        allowed = [n for n in range(1, kv + 1) if kv % n == 0 and query % n == 0]
        raise UnsupportedInputError(
            f"{heads}, which {num_ranks} ranks cannot share equally; use "
            f"{', '.join(map(str, allowed))} ranks. KV heads are not replicated: transformers cuts "
            f"the rows of k_proj and v_proj into {num_ranks} parts, {kv / num_ranks:g} heads each, "
            "and its own forward fails on parts of heads."
        )


def _splits(model: nn.Module, names: re.Pattern[str]) -> bool:
    """Whether projections are sharded and what comes out of them is not gathered."""
    found: list[Any] = [p for name, p in model.named_parameters() if names.search(name)]
    plan = getattr(model, "tp_plan", None) or {}
    gathered = [style in _GATHERED for rule, style in plan.items() if names.search(rule)]
    is_cut = any(is_sharded(p) and p.placements[0].is_shard() for p in found)
    return is_cut and not (gathered and all(gathered))


def _sizes(mesh: Any) -> dict[str, int]:
    names = getattr(mesh, "mesh_dim_names", None)
    return dict(zip(names, mesh.shape, strict=True)) if names else {}


def meshes_in(model: nn.Module) -> list[Any]:
    """Return the meshes and process groups that modules hold; a copy of a model shares them."""
    found: list[Any] = []
    for module in model.modules():
        for value in vars(module).values():
            kind = type(value)
            if kind.__name__ in ("DeviceMesh", "ProcessGroup", "TransformersDeviceMesh"):
                found.append(value)
    return found
