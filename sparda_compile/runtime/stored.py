"""The tensors of a KV cache as a file holds them, and back.

Stored is every state tensor by its name in the graph, with two parts left out: pages that no block
has, and blocks in CPU memory that no sequence has filled. `host` is the blocks themselves, also on
CUDA, where the state has their addresses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.errors import KVCacheError
from sparda_compile.state.layout import LENGTHS, state_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sparda_compile.runtime.kv_cache import KVCache
    from sparda_compile.state.layout import TensorSpec

__all__ = ["restore", "stored"]

# Dimension of the pages in `pages`, and of the blocks in `host`.
_PLACES: Final = 2


def stored(kv: KVCache) -> dict[str, Tensor]:
    """Return what a file of a cache has to hold, in CPU memory; waits for the device.

    Args:
        kv: The cache.

    Returns:
        Its tensors by graph input name; those of a cache on the CPU share its memory.
    """
    device = kv.state[LENGTHS].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the CPU is about to read what the GPU wrote
    found = kv.state | kv.host_blocks
    num_full = [length // kv.layout.config.block_size for length in kv.lengths()]
    for shape in kv.layout.layers:
        if shape.kind != "sparse":
            continue
        pages, host = (state_name(name, shape.layer) for name in ("pages", "host"))
        has_block = kv.state[state_name("page_block", shape.layer)] >= 0
        found[pages] = found[pages][:, :, : _last(has_block.flatten(0, 1).any(0))]
        if kv.layout.offload:
            found[host] = _filled(found[host], num_full)
    on_cpu = {name: tensor.cpu() for name, tensor in found.items()}  # host-sync: a file is written
    return {name: tensor.contiguous() for name, tensor in on_cpu.items()}


def restore(kv: KVCache, tensors: Mapping[str, Tensor]) -> None:
    """Put what `stored` returned into an empty cache of the same sizes.

    Args:
        kv: An empty cache.
        tensors: By graph input name.

    Raises:
        KVCacheError: If one is missing, unknown, of another shape or dtype, or if the tables say
            of a block that it has a page which has another; the cache is empty then.
    """
    specs = kv.layout.all_tensors()
    if set(tensors) != set(specs):
        missing, unknown = sorted(set(specs) - set(tensors)), sorted(set(tensors) - set(specs))
        raise KVCacheError(f"tensors {missing} are missing and {unknown} unknown")
    for name, spec in specs.items():
        _check(name, spec, tensors[name])
    _check_tables(kv, tensors)
    for name, tensor in tensors.items():
        target = kv.host_blocks.get(name, kv.state[name])
        target[tuple(slice(0, size) for size in tensor.shape)] = tensor.to(target.device)


def _last(is_used_C: Tensor) -> int:
    """Return one more than the last place that is used, 0 for none."""
    used = torch.where(is_used_C)[0]
    return int(used[-1]) + 1 if len(used) else 0


def _filled(host: Tensor, num_full: list[int]) -> Tensor:
    """Return the blocks that sequences have filled; what others had there before is zero."""
    kept = host[:, :, : max(num_full)].clone()
    for row, count in enumerate(num_full):
        kept[row, :, count:] = 0
    return kept


def _check(name: str, spec: TensorSpec, tensor: Tensor) -> None:
    wanted, got = list(spec.shape), list(tensor.shape)
    may_be_cut = name.startswith(("sparda_pages_", "sparda_host_")) and len(got) > _PLACES
    if may_be_cut and len(wanted) == len(got) and got[_PLACES] <= wanted[_PLACES]:
        wanted[_PLACES] = got[_PLACES]
    if got != wanted or tensor.dtype != spec.dtype:
        raise KVCacheError(
            f"{name} is {tuple(got)} of {tensor.dtype}, not {spec.shape} of {spec.dtype}"
        )


def _check_tables(kv: KVCache, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tables by which a kernel would read what is no page, or no block."""
    lengths = tensors[LENGTHS]
    if bool(((lengths < 0) | (lengths > kv.layout.max_tokens)).any()):
        raise KVCacheError(f"lengths {lengths.tolist()} are not 0 to {kv.layout.max_tokens}")
    for shape in kv.layout.layers:
        if shape.kind != "sparse":
            continue
        table_name, owner_name, pages_name = (
            state_name(name, shape.layer) for name in ("block_table", "page_block", "pages")
        )
        table, owner = tensors[table_name], tensors[owner_name]
        num_pages, num_stored = owner.shape[-1], tensors[pages_name].shape[_PLACES]
        in_range = (table >= -1) & (table < min(num_pages, num_stored))
        is_paged = table >= 0
        safe = table.clamp(min=0, max=num_pages - 1).long()
        agrees = owner.gather(-1, safe) == torch.arange(table.shape[-1])
        same_number = is_paged.sum(-1) == (owner >= 0).sum(-1)
        if not bool(in_range.all() & (agrees | ~is_paged).all() & same_number.all()):
            raise KVCacheError(f"{table_name} and {owner_name} contradict each other")
