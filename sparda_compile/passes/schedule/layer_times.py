"""What the parts of a layer's attention take, as the planning machine's constants say.

    select      scores, the choice of blocks and their pages, the new token's key and value
    speculate   attention to predicted blocks, beside it
    repair      the selected blocks that were not predicted, and the merge
    serial      attention that begins when the selection has ended

A layer speculates if max(select, speculate, bytes of both) + repair < select + serial: what runs
beside each other shares the memory's bandwidth. Known of a layer are its shapes alone, so that
prompts, which leave the first prediction, decide as the decode does.

In mode `exact` a layer attends to what is there while its repair comes, if that hides more than it
adds: min(repair, attention to what is there) > both attentions and what joins them - one attention.

Source: PRR (arXiv 2606.30389) sections 2 and 4.4. Differs from the paper, which speculates in every
layer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Final

from sparda_compile.passes.schedule.expected_blocks import expected_misses, missed_share

if TYPE_CHECKING:
    from sparda_compile.passes.base import PassContext
    from sparda_compile.state.layout import LayerShape

__all__ = ["LayerTimes", "attends_before_repair", "layer_times", "speculates"]

_SELECTING: Final = ("append_kv", "update_summary")


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """What the parts of a layer take, microseconds.

    Attributes:
        select_us: Scores and the choice of blocks.
        start_us: Attention to predicted blocks, however few.
        block_us: Each of them more, of all sequences and KV heads.
        repair_us: Repair and merge, if nothing was missed.
        miss_us: Each missed block more.
        serial_us: Attention that begins when the selection has ended.
        read_us: Of `select_us`, what its bytes take.
    """

    select_us: float
    start_us: float
    block_us: float
    repair_us: float
    miss_us: float
    serial_us: float
    read_us: float = 0.0

    def speculating_us(self, budget: float, misses: float) -> float:
        """Return what selection and attention take with a budget.

        Args:
            budget: Blocks predicted for each sequence and KV head.
            misses: Selected blocks among them that were not, on the mean.
        """
        early = self.start_us + budget * self.block_us
        both_read = self.read_us + budget * self.block_us
        return max(self.select_us, early, both_read) + self.repair_us + misses * self.miss_us

    def pays(self, budget: float, misses: float) -> bool:
        """Return whether that is less than without speculation."""
        return self.speculating_us(budget, misses) < self.select_us + self.serial_us


def layer_times(shape: LayerShape, group_size: int, ctx: PassContext) -> LayerTimes:
    """Return what the parts of a sparse layer take in a decode step.

    Args:
        shape: The layer.
        group_size: R, query heads of one KV head.
        ctx: What passes know; it has a layout.
    """
    assert ctx.layout is not None
    assert ctx.strategy.selector is not None
    machine, selector = ctx.machine, ctx.strategy.selector
    layout = dataclasses.replace(ctx.layout, batch_size=ctx.batch_size)
    specs, pairs = layout.tensors(shape), ctx.batch_size * shape.num_groups
    scored = set(layout.summary_tensors(selector.summary.name, shape))
    read = sum(specs[name].num_bytes for name in scored - {*selector.summary.uncounted})
    is_fused = "fuse_selection" not in ctx.config.disable_passes
    choosing = ("select_pages",) if is_fused else ("select_blocks", "plan_pages")
    block = layout.page_bytes(shape)
    partial = group_size * (shape.head_dim + 1) * 4

    def us(op: str, num_bytes: float = 0.0) -> float:
        return machine.latency_of(op) + bytes_us(num_bytes)

    def bytes_us(num_bytes: float) -> float:
        return num_bytes / (machine.memory_gbps * 1e3)

    def pages_us(pages: float) -> float:
        return machine.pages_us(pages * block, pages * layout.unpacked(shape))

    # Scores are written, and read.
    scoring = machine.score_us(selector.timed_as, read + 2 * pairs * layout.num_blocks * 4)
    reading = scoring - machine.score_us(selector.timed_as, 0.0)
    return LayerTimes(
        select_us=sum(map(us, (*_SELECTING, *choosing))) + scoring,
        start_us=us("attend_predicted"),
        block_us=pages_us(pairs) + bytes_us(pairs * partial),
        repair_us=us("repair_predicted", pairs * layout.num_selected * partial),
        miss_us=pages_us(pairs),
        serial_us=us("sparse_attention") + pages_us(pairs * layout.num_selected),
        read_us=reading,
    )


def speculates(shape: LayerShape, group_size: int, ctx: PassContext) -> bool:
    """Return whether a layer begins its attention before its selection has ended.

    Args:
        shape: The layer.
        group_size: R, query heads of one KV head.
        ctx: What passes know; it has a layout.
    """
    assert ctx.layout is not None
    if ctx.strategy.predictor is None or shape.kind != "sparse":
        return False
    if ctx.config.speculate_where == "always":
        return True
    if not ctx.machine.overlaps:
        return False
    times = layer_times(shape, group_size, ctx)
    return times.pays(ctx.layout.num_predicted, math.ceil(expected_misses(ctx)))


def attends_before_repair(shape: LayerShape, ctx: PassContext) -> bool:
    """Return whether a layer of mode `exact` attends to what is there while its repair comes.

    Where no stream runs beside another it does: programs there are those of a GPU, and no faster.

    Args:
        shape: The layer.
        ctx: What passes know; it has a layout.
    """
    assert ctx.layout is not None
    layout, machine = ctx.layout, ctx.machine
    if ctx.config.attend_before_repair == "always" or not machine.overlaps:
        return True
    hints = [h for h in ctx.strategy.hints if h.source(shape, layout.layers) is not None]
    fresh = layout.fresh_share(ctx.config.expected_overlap)
    late = layout.num_scored * fresh * missed_share(hints, ctx)
    pairs = ctx.batch_size * shape.num_groups
    stored = layout.stored_bytes(shape.layer, shape.head_dim, shape.dtype)
    repair_us = machine.launch_us + pairs * late * stored / (machine.link_gbps * 1e3)
    pages = pairs * layout.num_selected
    read_us = machine.pages_us(pages * layout.page_bytes(shape), pages * layout.unpacked(shape))
    early_us = machine.latency_of("attend_resident") + read_us
    # One more launch: of two streams that are joined, one waits for the other's event.
    added_us = machine.latency_of("attend_resident") + machine.latency_of("attend_missing")
    added_us += machine.launch_us - machine.latency_of("sparse_attention")
    return min(repair_us, early_us) > added_us
