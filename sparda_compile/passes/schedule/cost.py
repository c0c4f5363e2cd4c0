"""Cost of a node: the roofline of its FLOPs, its bytes in device memory and its bytes on the link.

    us = kernel + max(flops / rate, bytes / bandwidth)       a kernel of the model
    us = bytes / bandwidth, + kernel if it begins one        an elementwise node
    us = latency of the op + max(flops / rate, bytes / ..)   an op of ours
    us = numbers / rate of unpacking, if that is more    attention to pages of stored runs
    us = the line of the selector, `Machine.score_us`        scores of a decode step
    us = the sum of its nodes'                               a piece that an op runs
    us = launch + expected bytes / link bandwidth            a copy
    us = latency of the op + bytes sent / rate to peers      a collective

A compiler fuses elementwise nodes with each other, and not with a matrix multiplication: what
follows one is a kernel of its own (`kernels_of.py`).

In a decode step many kernels have few bytes, and what takes the time is phases that wait for each
other: at 128K tokens `select_pages` takes 11.9 us on an H200, and its bytes 0.01. So each op has a
latency of its own, `Machine.latency_us`, and each kernel of the model `Machine.kernel_us`, which
bytes do not change. What runs beside a node is no part of its cost: `simulate.py` counts it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from torch import Tensor, fx

from sparda_compile.graph.effects import argument, instruction, takes
from sparda_compile.graph.nodes import call_name, fake_value
from sparda_compile.graph.side_piece import side_piece_of
from sparda_compile.graph.tags import LAYER
from sparda_compile.isa.table import Work
from sparda_compile.passes.schedule.expected_blocks import link_bytes, read_bytes
from sparda_compile.passes.schedule.kernels_of import KERNELS, VIEWS, begin_kernels
from sparda_compile.passes.schedule.num_bytes import EXAMPLE_TOKENS, num_bytes, numel
from sparda_compile.registry import SELECTORS
from sparda_compile.state.layout import state_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparda_compile.isa.table import Instruction
    from sparda_compile.passes.base import PassContext

__all__ = ["SCORES_TAKE", "Cost", "costs_of", "longer_copies", "node_cost"]

# Share of the device that scores hold while they stream over a summary: on an H200, scores by
# `lowbit2` of 86 us a layer lengthen the model's 211 beside them by 70.
SCORES_TAKE: Final = 0.8
_ATTENDS: Final = frozenset({Work.HITS, Work.MISSES, Work.PREDICTED, Work.REPAIRED})


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one node is expected to take while nothing runs beside it.

    Attributes:
        us: Microseconds.
        hbm_bytes: Of device memory that it reads or writes.
        link_bytes: That it sends over the link.
        least_taken: Share of the device that it takes at least from what runs beside it, whatever
            its bytes are.
    """

    us: float
    hbm_bytes: int = 0
    link_bytes: int = 0
    least_taken: float = 0.0


def costs_of(graph: fx.Graph, ctx: PassContext) -> dict[fx.Node, Cost]:
    """Return the expected cost of every node of a program on the context's machine."""
    begin = begin_kernels(graph)
    return {node: node_cost(node, ctx, begins_kernel=node in begin) for node in graph.nodes}


def longer_copies(costs: Mapping[fx.Node, Cost], times: float) -> dict[fx.Node, Cost]:
    """Return costs with copies over the link that take so many times as long."""
    return {
        node: dataclasses.replace(cost, us=cost.us * times) if cost.link_bytes else cost
        for node, cost in costs.items()
    }


def node_cost(node: fx.Node, ctx: PassContext, *, begins_kernel: bool = False) -> Cost:
    """Return the expected cost of a node on the context's machine.

    Args:
        node: The node.
        ctx: What the pass knows.
        begins_kernel: Whether a node of the model begins a kernel; see `begin_kernels`.
    """
    name, it = call_name(node), instruction(node)
    if node.op not in ("call_function", "call_method") or name in VIEWS:
        return Cost(0.0)
    if it is not None and it.work is Work.NONE:
        return Cost(0.0)
    machine = ctx.machine
    if it is not None and it.work in (Work.TO_DEVICE, Work.TO_STAGING, Work.TO_HOST):
        link = link_bytes(node, it.work, ctx)
        return Cost(machine.launch_us + link / (machine.link_gbps * 1e3), 0, link)
    if it is not None and it.is_collective:
        return _together(node, it, ctx)
    if it is not None and it.work is Work.PIECE:
        return _of_piece(node, ctx)
    hbm_bytes = _bytes(node, ctx) if it is None else _sparda_bytes(node, it.work, ctx)
    flops = _flops(node, ctx) if it is None else _sparda_flops(node, it.work, ctx)
    us = max(flops / (machine.tflops * 1e6), hbm_bytes / (machine.memory_gbps * 1e3))
    if it is not None:
        us = max(us, machine.pages_us(0.0, _unpacked(node, it, ctx)))
    if it is not None and it.name == "score_blocks":
        scorer = SELECTORS[argument(node, "selector")].timed_as
        us = machine.score_us(scorer, hbm_bytes)
        busy = 1.0 - machine.score_us(scorer, 0.0) / us
        return Cost(us, hbm_bytes, least_taken=SCORES_TAKE * busy)
    if it is not None:
        us += machine.latency_of(it.name, it.latency_us)
    elif begins_kernel:
        us += machine.kernel_us
    return Cost(us, hbm_bytes)


def _together(node: fx.Node, it: Instruction, ctx: PassContext) -> Cost:
    """Return the cost of a collective: what each rank sends, at the rate between ranks."""
    ranks, result = argument(node, "num_ranks"), num_bytes(fake_value(node), ctx)
    turns = 2 if it.work is Work.REDUCED else 1
    sent = turns * (ranks - 1) / ranks * result
    us = ctx.machine.latency_of(it.name, it.latency_us) + sent / (ctx.machine.peer_gbps * 1e3)
    return Cost(us, 2 * result)


def _of_piece(node: fx.Node, ctx: PassContext) -> Cost:
    """Return the cost of a piece that an op runs: that of its nodes, one after another."""
    costs = costs_of(side_piece_of(node).graph_module.graph, ctx).values()
    return Cost(sum(cost.us for cost in costs), sum(cost.hbm_bytes for cost in costs))


def _bytes(node: fx.Node, ctx: PassContext) -> int:
    if call_name(node) == "embedding":  # of its table the rows that it returns
        return 2 * num_bytes(fake_value(node), ctx)
    values = [fake_value(n) for n in (node, *node.all_input_nodes)]
    return sum(num_bytes(value, ctx) for value in values)


def _sparda_bytes(node: fx.Node, work: Work, ctx: PassContext) -> int:
    """Bytes that an op touches: of pools the selected blocks, of summaries all that is scored.

    What takes in new tokens writes these and leaves the rest of its pool or summary alone.
    """
    assert ctx.layout is not None
    if work is Work.NEW_TOKENS:
        new = [argument(node, name) for name in ("k", "v") if takes(node, name)]
        return 2 * sum(num_bytes(fake_value(n), ctx) for n in new)
    total = num_bytes(fake_value(node), ctx)
    uncounted = _uncounted(node)
    pages = argument(node, "pages") if takes(node, "pages") else None
    for source in node.all_input_nodes:
        value = fake_value(source)
        if source.name in uncounted:
            continue
        is_pool = isinstance(value, Tensor) and (value.dim() == 6 or source is pages)
        total += read_bytes(node, value, work, ctx) if is_pool else num_bytes(value, ctx)
    return total


def _unpacked(node: fx.Node, it: Instruction, ctx: PassContext) -> float:
    """Return how many numbers attention of a decode step unpacks of its pages."""
    if it.work not in _ATTENDS and it.name != "sparse_attention":
        return 0.0
    assert ctx.layout is not None
    shape = next(s for s in ctx.layout.layers if s.layer == LAYER.of(node))
    read = read_bytes(node, fake_value(argument(node, "pages")), it.work, ctx)
    return read / ctx.layout.page_bytes(shape) * ctx.layout.unpacked(shape)


def _uncounted(node: fx.Node) -> set[str]:
    """Return the state that a node's selector does not read as a whole."""
    if not takes(node, "selector"):
        return set()
    names = SELECTORS[argument(node, "selector")].summary.uncounted
    return {state_name(name, LAYER.of(node)) for name in names}


def _sparda_flops(node: fx.Node, work: Work, ctx: PassContext) -> float:
    """Products of a prompt's tokens: with the blocks that they read, with pooled keys or all.

    Those are of half a cache, or of the new tokens alone where the past was scored before.
    """
    assert ctx.layout is not None
    if work not in (Work.TOKEN_SCORES, Work.TOKEN_BLOCKS):
        return 0.0
    query = numel(fake_value(argument(node, "query")).shape, ctx)
    if work is Work.TOKEN_BLOCKS:
        return 4.0 * query * ctx.layout.num_selected * ctx.layout.config.block_size
    near = takes(node, "near_ids") and argument(node, "near_ids") is not None
    tokens = EXAMPLE_TOKENS if near else ctx.layout.max_tokens / 2
    each = SELECTORS[argument(node, "selector")].scores_tokens
    return 2.0 * query * tokens / (1 if each else ctx.layout.config.pool_stride)


def _flops(node: fx.Node, ctx: PassContext) -> float:
    name = call_name(node)
    value = fake_value(node)
    if not isinstance(value, Tensor) or name not in KERNELS:
        return 0.0
    if name in ("linear", "addmm", "matmul", "bmm", "baddbmm"):
        operands = [fake_value(n) for n in node.all_input_nodes]
        matrices = [v for v in operands if isinstance(v, Tensor) and v.dim() >= 2]
        return 2.0 * numel(value.shape, ctx) * numel(matrices[0].shape[-1:], ctx)
    return float(numel(value.shape, ctx))
