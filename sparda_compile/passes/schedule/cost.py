"""Cost of a node: the roofline of its FLOPs, its bytes in device memory and its bytes on the link.

    us = max(flops / rate, bytes / bandwidth, launch)        a kernel of the model
    us = latency of the op + bytes / bandwidth               an op of ours
    us = launch + expected bytes / link bandwidth            a copy

Elementwise nodes cost their bytes only: a compiler fuses them into their neighbours.

In a decode step many ops of ours have few bytes, and what takes the time is phases that wait for
each other: at 128K tokens `select_pages` takes 11.9 us on an H200, and its bytes 0.01. So each op
has a latency of its own, `Machine.latency_us`, which its bytes do not change.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparda_compile.graph.effects import argument, instruction, takes
from sparda_compile.graph.nodes import call_name, fake_value
from sparda_compile.graph.tags import LAYER
from sparda_compile.isa.table import Work
from sparda_compile.registry import SELECTORS
from sparda_compile.sizes import concrete
from sparda_compile.state.layout import state_name

if TYPE_CHECKING:
    from sparda_compile.passes.base import PassContext

__all__ = ["Cost", "expected_misses", "node_cost"]

_EXAMPLE_TOKENS: Final = 1024
_FREE: Final = frozenset(
    {
        "getitem",
        "view",
        "reshape",
        "transpose",
        "permute",
        "expand",
        "unsqueeze",
        "squeeze",
        "contiguous",
        "to",
        "float",
        "size",
        "split",
        "chunk",
        "flatten",
        "unflatten",
        "detach",
    }
)
_KERNELS: Final = frozenset(
    {
        "linear",
        "addmm",
        "matmul",
        "bmm",
        "baddbmm",
        "einsum",
        "embedding",
        "softmax",
        "topk",
        "scaled_dot_product_attention",
        "grouped_mm",
        "_grouped_mm",
        "sort",
        "index_add_",
    }
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one node is expected to take."""

    us: float
    hbm_bytes: int = 0
    link_bytes: int = 0


def node_cost(node: fx.Node, ctx: PassContext) -> Cost:
    """Return the expected cost of a node on the context's machine."""
    name, it = call_name(node), instruction(node)
    if node.op not in ("call_function", "call_method") or name in _FREE:
        return Cost(0.0)
    if it is not None and it.work is Work.NONE:
        return Cost(0.0)
    machine = ctx.machine
    if it is not None and it.work in (Work.TO_DEVICE, Work.TO_STAGING, Work.TO_HOST):
        link = _link_bytes(node, it.work, ctx)
        return Cost(machine.launch_us + link / (machine.link_gbps * 1e3), 0, link)
    num_bytes = _bytes(node, ctx) if it is None else _sparda_bytes(node, it.work, ctx)
    flops = _flops(node, ctx) if it is None else _sparda_flops(node, it.work, ctx)
    us = max(flops / (machine.tflops * 1e6), num_bytes / (machine.memory_gbps * 1e3))
    if it is not None:
        us += machine.latency_of(it.name, it.latency_us)
    elif name in _KERNELS:
        us = max(us, machine.launch_us)
    return Cost(us, num_bytes)


def _size(value: Any, ctx: PassContext) -> int:
    """Bytes of a fake value; a prompt counts as an example of one."""
    if isinstance(value, (list, tuple)):
        return sum(_size(v, ctx) for v in value)
    if not isinstance(value, Tensor):
        return 0
    if is_traceable_wrapper_subclass(value):  # a quantised weight
        names, _ = value.__tensor_flatten__()
        return sum(_size(getattr(value, name), ctx) for name in names)
    return _numel(value.shape, ctx) * value.dtype.itemsize


def _numel(shape: tuple[int, ...], ctx: PassContext) -> int:
    return _product(shape, ctx.batch_size)


@functools.lru_cache(maxsize=1 << 14)
def _product(shape: tuple[int, ...], batch_size: int) -> int:
    return math.prod(concrete(shape, batch_size, _EXAMPLE_TOKENS))


def _bytes(node: fx.Node, ctx: PassContext) -> int:
    values = [fake_value(n) for n in (node, *node.all_input_nodes)]
    return sum(_size(value, ctx) for value in values)


def _sparda_bytes(node: fx.Node, work: Work, ctx: PassContext) -> int:
    """Bytes that an op touches: of pools the selected blocks, of summaries all that is scored.

    What takes in new tokens writes these and leaves the rest of its pool or summary alone.
    """
    assert ctx.layout is not None
    if work is Work.NEW_TOKENS:
        new = [argument(node, name) for name in ("k", "v") if takes(node, name)]
        return 2 * sum(_size(fake_value(n), ctx) for n in new)
    total = _size(fake_value(node), ctx)
    uncounted = _uncounted(node)
    for source in node.all_input_nodes:
        value = fake_value(source)
        if source.name in uncounted:
            continue
        is_pool = isinstance(value, Tensor) and value.dim() == 6
        total += _pool_bytes(value, work, ctx) if is_pool else _size(value, ctx)
    return total


def _uncounted(node: fx.Node) -> set[str]:
    """Return the state that a node's selector does not read as a whole."""
    if not takes(node, "selector"):
        return set()
    names = SELECTORS[argument(node, "selector")].summary.uncounted
    return {state_name(name, LAYER.of(node)) for name in names}


def expected_misses(ctx: PassContext) -> float:
    """Return how many selected blocks a prediction is expected to miss, the current one included.

    As many of those that scores choose as the step before did not choose: a prediction that has
    seen more steps is taken to miss no more.
    """
    assert ctx.layout is not None
    scored = max(ctx.layout.num_selected - ctx.config.num_forced, 0)
    return 1.0 + scored * (1.0 - ctx.config.expected_overlap)


def _pool_bytes(pool: Tensor, work: Work, ctx: PassContext) -> int:
    """Return the bytes of the blocks of a pool that an op reads."""
    assert ctx.layout is not None
    num_blocks = {Work.PREDICTED: ctx.layout.num_predicted, Work.REPAIRED: expected_misses(ctx)}
    if work not in num_blocks:
        return _selected_bytes(pool, ctx)
    pairs, block = _numel(pool.shape[:2], ctx), _numel(pool.shape[3:], ctx)
    return int(pairs * num_blocks[work] * block * pool.dtype.itemsize)


def _selected_bytes(pool: Tensor, ctx: PassContext, *, forced: bool = True) -> int:
    """Return the bytes of the selected blocks of a pool, or of those alone that scores chose."""
    assert ctx.layout is not None
    blocks = min(ctx.layout.num_selected, pool.shape[2])
    if not forced:
        blocks = max(blocks - ctx.layout.config.num_forced, 0)
    pairs, block = _numel(pool.shape[:2], ctx), _numel(pool.shape[3:], ctx)
    return pairs * blocks * block * pool.dtype.itemsize


def _link_bytes(node: fx.Node, work: Work, ctx: PassContext) -> int:
    """Expected bytes of a copy, from the share of blocks that is new in each step.

    Sinks and local blocks are read in every step, and were on the device when they were written.
    """
    assert ctx.layout is not None
    pages = fake_value(argument(node, "pages"))
    if work is Work.TO_HOST:
        new_kv = argument(node, "new_kv")
        if new_kv:
            return sum(_size(fake_value(n), ctx) for n in new_kv)
        # One block per `block_size` steps.
        block = _numel((*pages.shape[:2], *pages.shape[3:]), ctx) * int(pages.dtype.itemsize)
        return block // ctx.layout.config.block_size
    if work is Work.TO_STAGING:
        return _staged_bytes(pages, ctx)
    fresh = 1.0 - ctx.config.expected_overlap
    return int(_selected_bytes(pages, ctx, forced=False) * fresh)


def _staged_bytes(pages: Tensor, ctx: PassContext) -> int:
    """Expected bytes of the past blocks that an example of a prompt reads, from CPU memory.

    The cache is half full, and each token replaces as many blocks as each step does.
    """
    assert ctx.layout is not None
    if not ctx.layout.offload:
        return 0
    scored = max(ctx.layout.num_selected - ctx.layout.config.num_forced, 0)
    fresh = scored * (1.0 - ctx.config.expected_overlap)
    blocks = min(ctx.layout.num_selected + fresh * _EXAMPLE_TOKENS, ctx.layout.num_blocks / 2)
    pairs, block = _numel(pages.shape[:2], ctx), _numel(pages.shape[3:], ctx)
    return int(blocks * pairs * block * pages.dtype.itemsize)


def _sparda_flops(node: fx.Node, work: Work, ctx: PassContext) -> float:
    """Products of a prompt's tokens: with the blocks that they read, or with pooled keys.

    Those are of half a cache, or of the new tokens alone where the past was scored before.
    """
    assert ctx.layout is not None
    if work not in (Work.TOKEN_SCORES, Work.TOKEN_BLOCKS):
        return 0.0
    query = _numel(fake_value(argument(node, "query")).shape, ctx)
    if work is Work.TOKEN_BLOCKS:
        return 4.0 * query * ctx.layout.num_selected * ctx.layout.config.block_size
    near = takes(node, "near_ids") and argument(node, "near_ids") is not None
    tokens = _EXAMPLE_TOKENS if near else ctx.layout.max_tokens / 2
    return 2.0 * query * tokens / ctx.layout.config.pool_stride


def _flops(node: fx.Node, ctx: PassContext) -> float:
    name = call_name(node)
    value = fake_value(node)
    if not isinstance(value, Tensor) or name not in _KERNELS:
        return 0.0
    if name in ("linear", "addmm", "matmul", "bmm", "baddbmm"):
        operands = [fake_value(n) for n in node.all_input_nodes]
        matrices = [v for v in operands if isinstance(v, Tensor) and v.dim() >= 2]
        return 2.0 * _numel(value.shape, ctx) * _numel(matrices[0].shape[-1:], ctx)
    return float(_numel(value.shape, ctx))
