"""What fits: bytes of a variant's KV cache, known before anything is built.

A variant that does not fit is left out with a reason, and the largest batch of a budget comes with
what limited it. Bytes are those of `CacheLayout`, so they are what `KVCache` will take.
"""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.bench.programs import variant_config
from sparda_compile.runtime.host_pool import free_host_bytes
from sparda_compile.state.layout import CacheLayout, LayerShape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sparda_compile.bench.shapes import ModelShape

__all__ = [
    "GIB",
    "HOMES",
    "FreeMemory",
    "LargestBatch",
    "dense_kv_bytes",
    "free_everything",
    "largest_batch",
    "layout_of",
    "misfits",
    "pinned_region_bytes",
    "too_big",
]

GIB: Final = 1 << 30
# Programs that differ in knobs alone run on one cache; dense needs a part of resident's.
HOMES: Final = {"inline": "scheduled", "dense": "resident"}
# Joined weights, activations, CUDA graphs, and what `fill` takes while it makes random blocks.
_DEVICE_RESERVE: Final = 8 * GIB
_HOST_RESERVE: Final = 10 * GIB
_REGION: Final = 16 * GIB
_LEAST_REGION: Final = GIB


@dataclasses.dataclass(frozen=True)
class FreeMemory:
    """Bytes that a benchmark may take.

    Attributes:
        device: On the GPU.
        host: In CPU memory.
    """

    device: int
    host: int

    @classmethod
    def now(cls, max_host_bytes: int | None = None) -> FreeMemory:
        """Return what is free, less a reserve for what is not KV cache.

        Args:
            max_host_bytes: Most CPU memory to take; None is all that the machine has.
        """
        device = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
        host = min(free_host_bytes(), _container_bytes()) - _HOST_RESERVE
        if max_host_bytes is not None:
            host = min(host, max_host_bytes)
        return cls(max(device - _DEVICE_RESERVE, 0), max(host, 0))


def pinned_region_bytes() -> int:
    """Return the size of a region to draw blocks from: a KV cache's, if the machine has that."""
    return min(_REGION, max(FreeMemory.now().host // 4, _LEAST_REGION))


def _container_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Return what the container may still take: its limit is not in /proc/meminfo."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        stat = dict(line.split() for line in lines)
        return int(limit) - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):  # no limit reads as `max`
        return 1 << 62


def layout_of(
    shape: ModelShape,
    variant: str,
    batch_size: int,
    max_tokens: int,
    trace_steps: int = 0,
    **settings: Any,
) -> CacheLayout:
    """Return the layout of a variant's KV cache, in bf16.

    Args:
        shape: The model's sizes.
        variant: A key of `KNOBS`.
        batch_size: Sequences.
        max_tokens: Tokens per sequence.
        trace_steps: Steps of the trace, which only benchmarks have.
        **settings: Further fields of SpardaConfig.
    """
    config = variant_config(variant, max_tokens, trace_steps, **settings)
    layers = tuple(
        LayerShape(layer, "sparse", shape.num_groups, shape.head_dim, 0, torch.bfloat16)
        for layer in range(shape.num_layers)
    )
    return CacheLayout(config, layers, batch_size, max_tokens)


def dense_kv_bytes(shape: ModelShape, batch_size: int, max_tokens: int) -> int:
    """Return the bytes of all keys and values, in bf16."""
    per_token = shape.num_layers * shape.num_groups * 2 * shape.head_dim * 2
    return batch_size * max_tokens * per_token


def too_big(what: str, needed: int, where: str, free: int) -> str | None:
    """Return why something does not fit, None if it does."""
    if needed <= free:
        return None
    return (
        f"{what} needs {needed / GIB:.1f} GiB of {where} memory, and {free / GIB:.1f} GiB are to "
        "be had"
    )


def misfits(
    variants: Sequence[str], layouts: dict[str, CacheLayout], free: FreeMemory
) -> dict[str, str]:
    """Return the variants that do not fit beside those before them, with the reason.

    Args:
        variants: In the order in which they will be built.
        layouts: Of each variant that has a KV cache.
        free: What may be taken.
    """
    device, host = free.device, free.host
    reasons: dict[str, str] = {}
    held: dict[str, str | None] = {}
    for variant in variants:
        if variant not in layouts:
            continue
        home = HOMES.get(variant, variant)
        if home not in held:
            on_device = layouts[variant].num_bytes(on_host=False)
            on_host = layouts[variant].num_bytes(on_host=True)
            held[home] = too_big("its KV cache", on_device, "device", device) or too_big(
                "its KV cache", on_host, "CPU", host
            )
            if held[home] is None:
                device, host = device - on_device, host - on_host
        reason = held[home]
        if reason is not None:
            reasons[variant] = reason
    return reasons


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """The most sequences that fit, and what forbids one more.

    Attributes:
        batch_size: 0 if not even one fits.
        limited_by: `budget`, `CPU memory` or `device memory`.
        device_bytes: Of the KV cache at this batch size, without the trace.
        host_bytes: Of the KV cache at this batch size.
    """

    batch_size: int
    limited_by: str
    device_bytes: int
    host_bytes: int


def largest_batch(
    layout_for: Callable[[int], CacheLayout], budget: int, free: FreeMemory
) -> LargestBatch:
    """Return the largest batch whose KV cache keeps within a budget of device memory.

    Args:
        layout_for: Returns the layout of a batch size.
        budget: Bytes of device memory for the KV cache, tables and summaries included.
        free: What the machine has.
    """
    batch_size = 0
    while True:
        layout = layout_for(batch_size + 1)
        needs = {
            "budget": (layout.num_bytes(on_host=False), budget),
            "device memory": (layout.num_bytes(on_host=False), free.device),
            "CPU memory": (layout.num_bytes(on_host=True), free.host),
        }
        over = [name for name, (needed, limit) in needs.items() if needed > limit]
        if over:
            break
        batch_size += 1
    fits = layout_for(max(batch_size, 1))
    return LargestBatch(
        batch_size,
        over[0],
        fits.num_bytes(on_host=False) if batch_size else 0,
        fits.num_bytes(on_host=True) if batch_size else 0,
    )


def free_everything() -> None:
    """Give back the memory of what nobody holds any more: caches, programs, CUDA graphs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # Pinned memory that torch keeps for reuse; the name depends on its version.
        empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None) or getattr(
            torch._C, "_host_emptyCache", None
        )
        if empty_host_cache is not None:
            empty_host_cache()
