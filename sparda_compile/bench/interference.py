"""What a copy and the compute that runs beside it cost each other.

    main stream   matrix products of a few decoder layers, each with weights of its own
    side stream   blocks from pinned memory, by the gather kernel or by one memcpy
    hidden        (compute alone + copy alone - both at once) / copy alone     compute lasts longer
    held_up       (both at once - copy alone) / compute alone                  the copy lasts longer

A schedule can hide a copy no better than the first says: 1 if nothing is taken from the compute.
Where the link is the limit, a step is longer by the second than its copies: 0 if nothing is taken
from the copy. Whoever copies takes multiprocessors, if a kernel does it, and both share the memory
system. Blocks are drawn from a region as large as a KV cache.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.bench.memory import pinned_region_bytes
from sparda_compile.bench.timing import graph_us
from sparda_compile.kernels.gpu import copy
from sparda_compile.runtime.pinned import PinnedMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

__all__ = ["bench_interference", "machine_constants"]

# Inputs and outputs of the products of one layer of the 8b shape.
_PRODUCTS: Final = ((4096, 4608), (4096, 4096), (4096, 32768), (16384, 4096))
# Enough that the slowest copy ends first, that by one program, and too few for the fastest.
_LAYERS: Final = 14
_FEW_LAYERS: Final = 2
_BLOCKS: Final = 768
_WORDS: Final = 8192
_PROGRAMS: Final = (1, 2, 4, 8, 16, 32, 64)


def bench_interference(
    device: torch.device,
    products: Sequence[tuple[int, int]] = _PRODUCTS,
    num_blocks: int = _BLOCKS,
    programs: Sequence[int] = _PROGRAMS,
) -> dict[str, Any]:
    """Measure compute and copies, alone and at once.

    Args:
        device: A CUDA device.
        products: Inputs and outputs of the matrix products of a layer.
        num_blocks: Blocks of 32 KiB to copy; their copy should end before the compute of 14 layers
            does, and after that of 2.
        programs: Numbers of programs of a gather.

    Returns:
        By batch size and by who copies: microseconds, `hidden` and `held_up`.
    """
    block_bytes = _WORDS * 4
    region = PinnedMemory(max(pinned_region_bytes() // block_bytes, num_blocks) * block_bytes)
    host = region.tensor.view(torch.int32).view(-1, _WORDS)
    weights = [
        torch.randn(size, dtype=torch.bfloat16, device=device) for size in [*products] * _LAYERS
    ]
    result = {}
    for batch in (1, 16):
        inputs = {
            width: torch.randn(batch, width, dtype=torch.bfloat16, device=device)
            for width, _ in products
        }
        compute = partial(_multiply, weights, inputs)
        few = partial(_multiply, weights[: _FEW_LAYERS * len(products)], inputs)
        alone, few_alone = graph_us([compute]).median, graph_us([few]).median
        rows = {}
        for name, start in _copies(host, num_blocks, device, programs).items():
            copying, both = graph_us([start]).median, graph_us([_beside(compute, start)]).median
            with_few = graph_us([_beside(few, start)]).median
            rows[name] = {
                "copy_us": round(copying, 1),
                "both_us": round(both, 1),
                "hidden": round((alone + copying - both) / copying, 3),
                "held_up": round((with_few - copying) / few_alone, 3),
            }
        result[f"b{batch}"] = {"compute_us": round(alone, 1), "by_copy": rows}
    region.close()
    return result


def machine_constants(
    found: Mapping[str, Any],
    memory_gbps: float,
    products: Sequence[tuple[int, int]] = _PRODUCTS,
) -> tuple[float, float]:
    """Return `Machine.kernel_us` and `Machine.copy_share`, means over the batch sizes.

    Args:
        found: What `bench_interference` returned, in bf16, with the gather that is in use.
        memory_gbps: Bandwidth of the device's memory, 10^9 bytes per second.
        products: As measured.
    """
    kernels, shares = [], []
    for name, row in found.items():
        batch = int(name[1:])
        elements = sum(wide * out + batch * (wide + out) for wide, out in products)
        bytes_us = _LAYERS * elements * torch.bfloat16.itemsize / (memory_gbps * 1e3)
        kernels.append((row["compute_us"] - bytes_us) / (_LAYERS * len(products)))
        shares.append(1.0 - row["by_copy"][f"gather {copy.GATHER_PROGRAMS}"]["hidden"])
    kernel_us, copy_share = (sum(each) / len(each) for each in (kernels, shares))
    return round(max(kernel_us, 0.0), 2), round(min(max(copy_share, 0.0), 0.99), 3)


def _multiply(weights: Sequence[Tensor], inputs: dict[int, Tensor]) -> None:
    for weight in weights:
        torch.mm(inputs[weight.shape[0]], weight)


def _copies(
    host: Tensor, num_blocks: int, device: torch.device, programs: Sequence[int] = _PROGRAMS
) -> dict[str, Callable[[], object]]:
    """Return who can copy blocks of `host` [N, words], by name: random ones, or the first."""
    pages = torch.zeros(1, 1, num_blocks, 2, 64, 64, dtype=torch.int32, device=device)
    addresses = torch.tensor([[host.data_ptr()]], device=device)
    order = torch.arange(num_blocks, dtype=torch.int32, device=device).view(1, 1, -1)
    drawn = torch.randperm(len(host), device=device)[:num_blocks].int().view(1, 1, -1)
    calls: dict[str, Callable[[], object]] = {
        f"gather {count}": partial(copy.gather, drawn, order, addresses, pages, count)
        for count in programs
    }
    target = pages.view(num_blocks, -1)
    return {**calls, "memcpy": partial(target.copy_, host[:num_blocks], non_blocking=True)}


def _beside(compute: Callable[[], object], start: Callable[[], object]) -> Callable[[], None]:
    """Return a call that runs both, the copy on a stream of its own."""

    def in_turn() -> None:
        start()
        compute()

    if not torch.cuda.is_available():
        return in_turn  # for tests alone
    side = torch.cuda.Stream()

    def call() -> None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            start()
        compute()
        main.wait_stream(side)

    return call
