"""Expected bytes of blocks: what copies bring, and what attention reads.

Of the blocks that a layer chooses by score, the share 1 - overlap is new in each step. Of K blocks
that a step reads, C pages and N blocks, (C - K) / (N - K) of the new ones have a page, if they are
any of those that it did not read; so a step brings n = (1 - overlap) (N - C) / (N - K). With hints
1, 2, .., which name the share r_i of the new blocks:

    copy of hint i     n (f_i - r_i (1 - (1 - r_1) .. (1 - r_i-1)))      what an earlier one brought
                                                                         is not fetched again
    repair             n (1 - r_1) (1 - r_2) ..                          what all hints missed

f_i is 1: a hint changes as many of its blocks in a step as the layer does, and fetches those that
it names wrongly, too. It is 0 for a hint that names what has a page. That each names its share
independently of the others is assumed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, fx

from sparda_compile.graph.effects import argument, instruction, results_of, takes
from sparda_compile.graph.nodes import fake_value
from sparda_compile.graph.tags import HINT, LAYER
from sparda_compile.isa.table import Work
from sparda_compile.passes.schedule.num_bytes import EXAMPLE_TOKENS, num_bytes, numel

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sparda_compile.passes.base import PassContext
    from sparda_compile.state.layout import CacheLayout, LayerShape
    from sparda_compile.state.strategy import HintMethod

__all__ = ["expected_misses", "expected_repair", "link_bytes", "missed_share", "read_bytes"]


def link_bytes(node: fx.Node, work: Work, ctx: PassContext) -> int:
    """Return the expected bytes of a copy between CPU and device.

    Sinks and local blocks are read in every step, and were on the device when they were written.

    Args:
        node: The copy.
        work: Its kind, `TO_DEVICE`, `TO_STAGING` or `TO_HOST`.
        ctx: What the pass knows.
    """
    assert ctx.layout is not None
    pages = fake_value(argument(node, "pages"))
    if work is Work.TO_HOST:
        if not ctx.layout.offload:
            return 0  # it rounds in place
        new_kv = argument(node, "new_kv")
        if new_kv:
            new = sum(num_bytes(fake_value(n), ctx) for n in new_kv)
            return new * _stored_bytes(node, ctx) // ctx.layout.block_bytes(_shape(node, ctx))
        # One block per `block_size` steps.
        block = numel(pages.shape[:2], ctx) * _stored_bytes(node, ctx)
        return block // ctx.layout.config.block_size
    if work is Work.TO_STAGING:
        return _staged_bytes(node, ctx)
    blocks = numel(pages.shape[:2], ctx) * min(ctx.layout.num_scored, int(pages.shape[2]))
    return int(blocks * _stored_bytes(node, ctx) * _fetched_share(node, ctx))


def read_bytes(node: fx.Node, pool: Tensor, work: Work, ctx: PassContext) -> int:
    """Return the bytes that an op reads of a pool: those of the blocks that it attends to.

    Args:
        node: The op.
        pool: [B, G, pages, ...], fake.
        work: Its kind; some read a part of the selected blocks, or those that were predicted.
        ctx: What the pass knows.
    """
    assert ctx.layout is not None
    if work in (Work.PREDICTED, Work.REPAIRED):
        predicted = ctx.layout.num_predicted
        blocks = predicted if work is Work.PREDICTED else expected_misses(ctx)
        pairs, block = numel(pool.shape[:2], ctx), numel(pool.shape[3:], ctx)
        return int(pairs * blocks * block * pool.dtype.itemsize)
    selected = _selected_bytes(pool, ctx.layout.num_selected, ctx)
    if work not in (Work.HITS, Work.MISSES):
        return selected
    late = _late_share(node, ctx)
    return int(selected * (late if work is Work.MISSES else 1.0 - late))


def expected_misses(ctx: PassContext) -> float:
    """Return how many selected blocks a prediction is expected to miss, the current one included.

    As many of those that scores choose as the step before did not choose: a prediction that has
    seen more steps is taken to miss no more.
    """
    assert ctx.layout is not None
    return expected_repair(ctx.layout, ctx.config.expected_overlap)


def expected_repair(layout: CacheLayout, overlap: float) -> float:
    """Return the same for a cache.

    Args:
        layout: Its sizes.
        overlap: Share of the blocks chosen by score that the step before chose too.
    """
    return 1.0 + layout.num_scored * (1.0 - overlap)


def _selected_bytes(pool: Tensor, num_blocks: int, ctx: PassContext) -> int:
    """Return the bytes of so many blocks of each sequence and group, at most those of a pool."""
    blocks = min(num_blocks, pool.shape[2])
    pairs, block = numel(pool.shape[:2], ctx), numel(pool.shape[3:], ctx)
    return pairs * blocks * block * pool.dtype.itemsize


def _staged_bytes(node: fx.Node, ctx: PassContext) -> int:
    """Expected bytes of the past blocks that an example of a prompt reads, from CPU memory.

    The cache is half full, and each token replaces as many blocks as each step does.
    """
    assert ctx.layout is not None
    if not ctx.layout.offload:
        return 0
    fresh = ctx.layout.num_scored * (1.0 - ctx.config.expected_overlap)
    blocks = min(ctx.layout.num_selected + fresh * EXAMPLE_TOKENS, ctx.layout.num_blocks / 2)
    pairs = numel(fake_value(argument(node, "pages")).shape[:2], ctx)
    return int(blocks * pairs * _stored_bytes(node, ctx))


def _stored_bytes(copy: fx.Node, ctx: PassContext) -> int:
    """Return the bytes of one block in CPU memory, given a copy of such blocks."""
    assert ctx.layout is not None
    shape = _shape(copy, ctx)
    return ctx.layout.stored_bytes(shape.layer, shape.head_dim, shape.dtype)


def _shape(copy: fx.Node, ctx: PassContext) -> LayerShape:
    """Return what the cache knows of the layer of a copy."""
    assert ctx.layout is not None
    return next(shape for shape in ctx.layout.layers if shape.layer == LAYER.of(copy))


def _fetched_share(copy: fx.Node, ctx: PassContext) -> float:
    """Return the share of the scored blocks that a copy of a step brings."""
    assert ctx.layout is not None
    fresh = ctx.layout.fresh_share(ctx.config.expected_overlap)
    hints = _hints_of(argument(copy, "pages"), ctx)
    if not HINT.on(copy):
        return fresh * missed_share(hints, ctx)
    names = [hint.name for hint in hints]
    place = names.index(HINT.of(copy))
    brought_before = 1.0 - missed_share(hints[:place], ctx)
    hint = hints[place]
    return fresh * max(hint.fetched - _recall(hint, ctx) * brought_before, 0.0)


def _hints_of(pages: fx.Node, ctx: PassContext) -> list[HintMethod]:
    """Return the hints whose copies go to a pool, in the order of the configuration."""
    copies = (user for user in pages.users if HINT.on(user))
    named = {HINT.of(n) for n in copies if _is_copy(n)}
    return [hint for hint in ctx.strategy.hints if hint.name in named]


def _is_copy(node: fx.Node) -> bool:
    it = instruction(node)
    return it is not None and it.work is Work.TO_DEVICE


def _recall(hint: HintMethod, ctx: PassContext) -> float:
    stated = ctx.config.expected_recall
    return hint.recall if stated is None else stated


def missed_share(hints: Iterable[HintMethod], ctx: PassContext) -> float:
    """Return the share of a step's new blocks that none of some hints names."""
    share = 1.0
    for hint in hints:
        share *= 1.0 - _recall(hint, ctx)
    return share


def _late_share(node: fx.Node, ctx: PassContext) -> float:
    """Return the share of the selected blocks that waits for the repair.

    Attention goes by splits, and a split with one missing block waits as a whole.
    """
    assert ctx.layout is not None
    pages = argument(node, "pages")
    fresh = ctx.layout.fresh_share(ctx.config.expected_overlap)
    fresh *= missed_share(_hints_of(pages, ctx), ctx)
    selected = ctx.layout.num_selected
    missing = fresh * ctx.layout.num_scored / max(selected, 1)
    if takes(node, "partial_lse"):
        lse = fake_value(argument(node, "partial_lse"))
    else:
        lse = fake_value(node)[results_of(node).index("partial_lse")]
    return float(1.0 - (1.0 - missing) ** (selected / max(int(lse.shape[2]), 1)))
